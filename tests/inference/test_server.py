"""The server's HTTP side over a stand-in model: forms, streams, stops, the queue, errors, and who may ask."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from contextlib import contextmanager

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.server.engine import Engine, Queue, StopStrings
from unsloth_factory.inference.server.http import ModelServer
from unsloth_factory.inference.server.requests import Defaults, RequestError

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


def test_a_chat_completion():
    model = Model()
    with served(model, defaults={"system": "S", "thinking": False, "max_new_tokens": 50}) as server:
        status, value = chat(server, model="m", seed=5, temperature=0.5, top_p=0.9, max_tokens=40)
        template = server.engine.template
    assert status == 200
    assert value["object"] == "chat.completion"
    assert value["choices"] == [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "Hello, 世界!"},
        }
    ]
    assert value["usage"] == {"prompt_tokens": 17, "completion_tokens": 10, "total_tokens": 27}
    assert template.turns == (Turn("system", "S"), Turn("user", "hi"))
    assert template.thinking is False
    assert model.asked[0][1:] == (40, Sampling(temperature=0.5, top_p=0.9, top_k=20, seed=5))


def test_the_clients_system_prompt_and_thinking_win():
    with served(Model("<think>hm</think>yes"), defaults={"system": "S", "thinking": False}) as server:
        messages = [{"role": "developer", "content": [{"type": "text", "text": "mine"}]}, *HELLO]
        _, value = ask(server, {"messages": messages, "chat_template_kwargs": {"enable_thinking": True}})
        assert server.engine.template.turns == (Turn("system", "mine"), Turn("user", "hi"))
        assert server.engine.template.thinking is True
    assert value["choices"][0]["message"] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_a_stream_says_the_same():
    with served(Model("<think>hm</think>Hello, 世界!")) as server:
        _, events = chat(server, stream=True, stream_options={"include_usage": True})
        _, plain = chat(server, stream=True)
    assert events[-1] == "[DONE]"
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [event["choices"][0]["delta"] for event in events[:-2]]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, 世界!"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hm"
    assert [event["choices"][0]["finish_reason"] for event in events[-4:-2]] == [None, "stop"]
    assert events[-2]["usage"]["completion_tokens"] == 27
    assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events[:-1]}) == 1
    assert all("usage" not in event for event in plain[:-1])


def test_plain_completions_take_the_text_as_it_is():
    model = Model("<think>x")
    with served(model, defaults={"system": "S"}) as server:
        status, value = ask(server, {"prompt": "once<|im_end|>"}, "/v1/completions")
        _, events = ask(server, {"prompt": [104, 105], "stream": True}, "/v1/completions")
        assert error_of(ask(server, {"prompt": [70000]}, "/v1/completions"))[0] == 400
    assert status == 200
    assert value["object"] == "text_completion"
    assert value["choices"][0]["text"] == "<think>x"
    assert [asked[0] for asked in model.asked] == ["once<|im_end|>", "hi"]
    assert "".join(event["choices"][0]["text"] for event in events[:-1]) == "<think>x"
    assert events[-2]["choices"][0]["finish_reason"] == "stop"


def test_lengths_and_stop_strings():
    model = Model("one two three four")
    with served(model, max_positions=20) as server:
        assert chat(server, max_tokens=5)[1]["choices"][0]["finish_reason"] == "length"
        cut = chat(server, max_completion_tokens=90)[1]  # the context has 20, the prompt 8
        assert cut["usage"]["completion_tokens"] == 12
        assert cut["choices"][0]["finish_reason"] == "length"
        before = model.made
        stopped = chat(server, stop=[" thr", "zzz"])[1]
        assert stopped["choices"][0] | {"logprobs": 0} == {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": 0,
            "message": {"role": "assistant", "content": "one two"},
        }
        assert model.made - before == len("one two thr")  # nothing is computed beyond it
        assert chat(server, stop="one two three fiv")[1]["choices"][0]["message"]["content"] == "one two thre"


def test_stop_strings_by_pieces():
    for pieces in (["ab", "cd", "ef"], ["abcdef"], list("abcdef")):
        stops = StopStrings(("cde", "xyz"))
        assert "".join(map(stops.push, pieces)) + stops.finish() == "ab"
        assert stops.hit
    stops = StopStrings(("aab",))
    assert [stops.push(letter) for letter in "aaac"] == ["", "", "a", "aac"]
    assert stops.push("a") == ""
    assert stops.finish() == "a"
    both = StopStrings(("late", "la"))
    assert both.push("x late") == "x "
    assert StopStrings(()).push("abc") == "abc"


@pytest.mark.parametrize(
    ("fields", "parameter"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"chat_template_kwargs": {"enable_thinking": "yes"}}, "chat_template_kwargs"),
    ],
)
def test_what_is_not_understood_is_refused(fields, parameter):
    with served(Model()) as server:
        status, _, named = error_of(ask(server, {"messages": HELLO, **fields}))
        assert (status, named) == (400, parameter)
        assert chat(server)[0] == 200


def test_other_refusals(capsys):
    with served(Model()) as server:
        assert error_of(chat(server, model="gpt-4"))[0] == 404
        assert error_of(ask(server, {}, "/v1/embeddings"))[0] == 404
        assert error_of(ask(server, None, "/nothing", "GET"))[0] == 404
        assert error_of(ask(server, None, raw=b"{broken"))[:2] == (400, "The body is not a JSON object.")
        assert error_of(ask(server, None, raw=b"[" * 100_000))[0] == 400
        assert error_of(ask(server, None, raw=b"x" * 10, headers={"Content-Length": str(2**30)}))[0] == 413
        assert error_of(ask(server, {}, headers={"Content-Type": "text/plain"}))[0] == 415
        assert error_of(ask(server, {}, method="DELETE"))[0] == 501
        assert error_of(ask(server, {"messages": [{"role": "user", "content": "refuse"}]})) == (
            400,
            "the template refuses",
            None,
        )
        long = [{"role": "user", "content": "x" * 200}]
        status, value = ask(server, {"messages": long})
        assert (status, value["error"]["code"]) == (400, "context_length_exceeded")
        assert chat(server)[0] == 200
    with served(Model("broken")) as server:
        status, value = chat(server)
        assert (status, value["error"]["message"], value["error"]["type"]) == (500, "the child died", "server_error")
        _, events = chat(server, stream=True)
        assert events[-1]["error"]["message"] == "the child died"
        assert chat(server)[0] == 500  # it still answers
    with served(Model("bug")) as server:
        assert "terminal says more" in error_of(chat(server))[1]
    assert "RuntimeError: ours" in capsys.readouterr().err


def test_models_and_health():
    with served(Model()) as server:
        status, value = ask(server, None, "/v1/models", "GET")
        assert (status, [entry["id"] for entry in value["data"]]) == (200, ["m"])
        assert ask(server, None, "/v1/models/m", "GET")[1]["id"] == "m"
        assert ask(server, None, "/health", "GET")[0] == 200


def test_who_may_ask():
    with served(Model(), key="secret") as server:
        assert error_of(chat(server))[0] == 401
        assert ask(server, {"messages": HELLO}, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert ask(server, None, "/v1/models", "GET")[0] == 401
        assert ask(server, {"messages": HELLO}, headers={"Authorization": "Bearer secret"})[0] == 200
    with served(Model()) as server:  # a page that has its own name resolved to this machine
        assert ask(server, {"messages": HELLO}, headers={"Host": "evil.example:8000"})[0] == 403
        assert ask(server, {"messages": HELLO}, headers={"Host": "localhost:1"})[0] == 200


def test_one_at_a_time_in_the_order_of_coming():
    model = Model("abc", pause=0.03)
    with served(model) as server:
        threads = []
        for number in range(4):
            body = {"messages": [{"role": "user", "content": str(number)}]}
            threads.append(threading.Thread(target=ask, args=(server, body)))
            threads[-1].start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
    assert model.most == 1
    assert [asked[0] for asked in model.asked] == [f"user:{number}|" for number in range(4)]


def test_a_full_queue_sends_away():
    with served(Model("a" * 50, pause=0.01), most_waiting=1) as server:
        threads = [threading.Thread(target=chat, args=(server,)) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.05)
        status, message, _ = error_of(chat(server))
        assert status == 503
        assert "1 requests wait already" in message
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("streaming", [True, False])
def test_nothing_is_computed_for_a_client_that_left(streaming):
    model = Model("a" * 90, pause=0.02)
    with served(model) as server:
        client = socket.create_connection(("127.0.0.1", server.server_port))
        body = json.dumps({"messages": HELLO, "stream": streaming}).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        time.sleep(0.2)
        client.close()
        time.sleep(0.2)
        assert model.running == 0
        assert 0 < model.made < 40
        model.text = "next"
        assert chat(server)[0] == 200


def test_stopping_breaks_the_answer_off_and_sends_the_waiting_away():
    model = Model("a" * 90, pause=0.05)
    found = []
    with served(model) as server:
        threads = [threading.Thread(target=lambda: found.append(_status(server))) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        started = time.monotonic()
        assert server.queue.close(5.0)
        assert time.monotonic() - started < 1.0
        for thread in threads:
            thread.join()
    assert model.made < 20
    assert sorted(map(str, found)) == ["503", "broken off"]


def test_stopping_waits_for_every_thread_but_not_for_idle_connections():
    with served(Model("a" * 90, pause=0.02)) as server:
        idle = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        idle.request("GET", "/health")
        idle.getresponse().read()
        threading.Thread(target=lambda: _status(server), daemon=True).start()
        time.sleep(0.2)
        threads = list(server._connections)
        assert len(threads) == 2
        server.shutdown()
        started = time.monotonic()
        server.stop(5.0)
        assert time.monotonic() - started < 2.0
        assert not any(thread.is_alive() for thread in threads)
        assert server._connections == {}
        idle.close()


def _status(server):
    try:
        return chat(server)[0]
    except http.client.HTTPException:
        return "broken off"


def test_a_waiting_client_that_left_gives_its_place_up():
    queue = Queue(5)
    with queue.turn(lambda: False), pytest.raises(ConnectionError), queue.turn(lambda: True):
        pytest.fail("it had the turn")
    with queue.turn(lambda: False):
        pass
    assert queue.close(0.1)
    with pytest.raises(RequestError, match="stopping"), queue.turn(lambda: False):
        pytest.fail("it had the turn")


def test_one_connection_serves_several_requests():
    with served(Model()) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        for _ in range(3):
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps({"messages": HELLO}),
                {"Content-Type": "application/json; charset=utf-8"},
            )
            assert json.loads(connection.getresponse().read())["choices"]
        connection.close()


def test_no_json_makes_it_fail():
    """Every field with values of every kind: an answer or a refusal in the right form, never a failure of ours."""
    odd = [
        None,
        True,
        0,
        -1,
        2**70,
        1e308,
        0.5,
        "",
        "x",
        "\ud800",
        [],
        ["a"],
        [[]],
        {},
        {"a": 1},
        [None],
        [{"role": []}],
    ]
    odd += [
        [{"role": "user", "content": value}]
        for value in (None, 3, "\ud800", [], [{}], [{"type": "text"}], {"type": "text"})
    ]
    fields = ["messages", "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k"]
    fields += ["seed", "stop", "stream", "stream_options", "n", "tools", "response_format", "chat_template_kwargs"]
    seen = set()
    with served(Model("ok")) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
        for path, names in (("/v1/chat/completions", fields), ("/v1/completions", ["prompt", "echo"])):
            for name in names:
                for value in odd:
                    body = json.dumps({"messages": HELLO, "prompt": "hi", name: value})
                    connection.request("POST", path, body, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    text = response.read().decode()
                    assert response.status in (200, 400, 404), (path, name, value, text)
                    seen.add(response.status)
                    if response.status != 200:
                        assert json.loads(text)["error"]["message"]
    assert seen == {200, 400, 404}
