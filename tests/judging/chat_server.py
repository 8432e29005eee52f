"""An OpenAI-compatible server on the loopback whose answers a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """`answer(body)` gives the text, or (status, JSON value, headers), or a number of seconds to hang."""

    daemon_threads = True

    def __init__(self, answer: Callable[[dict], Any], models: tuple[str, ...] = ("fake",)) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.models = answer, models
        self.bodies: list[dict] = []
        self.headers_seen: list[dict[str, str]] = []
        self.together = self.most_together = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, *_) -> None:
        pass

    def reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode() if not isinstance(value, bytes) else value
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers_seen.append(dict(self.headers))
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        try:
            given = server.answer(body)
            if isinstance(given, float):
                time.sleep(given)
                given = "too late"
            if isinstance(given, tuple):
                return self.reply(*given)
            size = sum(len(message["content"]) for message in body["messages"])
            usage = {"prompt_tokens": size // 4, "completion_tokens": len(given) // 4}
            choice = {"index": 0, "message": {"role": "assistant", "content": given}, "finish_reason": "stop"}
            self.reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage})
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.together -= 1


@contextmanager
def serving(answer: Callable[[dict], Any], models: tuple[str, ...] = ("fake",)) -> Iterator[ChatServer]:
    server = ChatServer(answer, models)
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
