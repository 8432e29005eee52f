"""A stand-in model behind the real server, and a client."""

from __future__ import annotations

import http.client
import json
import threading
import time
from contextlib import contextmanager

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.server.engine import Engine
from unsloth_factory.inference.server.http import ModelServer
from unsloth_factory.inference.server.requests import Defaults

HELLO = [{"role": "user", "content": "hi"}]


class Letters:
    """A tokenizer of code points."""

    def encode(self, text):
        text.encode("utf-8")  # real ones fail on half a surrogate pair too
        return list(map(ord, text))

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def __len__(self):
        return 70000


class Template:
    """Prompts are `role:content|`; an assistant that is thinking opens with <think>."""

    tokenizer = Letters()

    def encode_prompt(self, turns, thinking):
        if any("refuse" in turn.content for turn in turns):
            raise UserError("the template refuses")
        self.turns, self.thinking = turns, thinking
        "".join(turn.content for turn in turns).encode("utf-8")
        return list(map(ord, "".join(f"{turn.role}:{turn.content}|" for turn in turns)))

    def opens_thinking(self, thinking):
        return False


class Model:
    """Says a text, a letter a token; remembers what it was asked."""

    def __init__(self, text: str = "Hello, 世界!", pause: float = 0.0) -> None:
        self.text, self.pause = text, pause
        self.asked: list[tuple[str, int, Sampling]] = []
        self.made = self.running = self.most = 0

    def __call__(self, prompt, limit, sampling):
        self.asked.append(("".join(map(chr, prompt)), limit, sampling))
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.text == "broken":
                raise UserError("the child died")
            if self.text == "bug":
                raise RuntimeError("ours")
            for letter in self.text[:limit]:
                time.sleep(self.pause)
                self.made += 1
                yield ord(letter)
        finally:
            self.running -= 1


@contextmanager
def served(model: Model, **options):
    defaults = Defaults(model="m", **options.pop("defaults", {}))
    engine = Engine(Template(), model, options.pop("max_positions", 100))
    server = ModelServer(("127.0.0.1", 0), engine, defaults, **options)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.stop(2.0)


def ask(server, body, path="/v1/chat/completions", method="POST", headers=None, raw=None):
    """(status, value) of one request; a stream is a list of its events."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    connection.request(method, path, data, {"Content-Type": "application/json", **(headers or {})})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    if response.headers["Content-Type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        return response.status, [event if event == "[DONE]" else json.loads(event) for event in events]
    return response.status, json.loads(text)


def chat(server, **fields):
    return ask(server, {"messages": HELLO, **fields})


def error_of(answer) -> tuple[int, str, str | None]:
    status, value = answer
    assert value["error"].keys() == {"message", "type", "param", "code"}
    return status, value["error"]["message"], value["error"]["param"]
