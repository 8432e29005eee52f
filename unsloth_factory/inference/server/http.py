"""The HTTP side: routes, JSON and event streams in OpenAI's form, and who may ask."""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.server.engine import Ending, Engine, Queue
from unsloth_factory.inference.server.requests import Defaults, Job, RequestError, read_chat, read_completion
from unsloth_factory.inference.stream import StreamEvent

LARGEST_BODY = 16 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
READERS: dict[str, Callable[[dict[str, Any], Defaults], Job]] = {
    "/v1/chat/completions": read_chat,
    "/v1/completions": read_completion,
}


class ModelServer(ThreadingHTTPServer):
    """Serves one model. `serve_forever` runs it, `stop` ends it.

    Args:
        address: Host and port; port 0 takes a free one.
        engine: The model.
        defaults: Its name, and what a request need not say.
        key: Bearer token that requests must carry; None asks for none.
        most_waiting: Requests that may wait for their turn.
        on_request: Called with one line for each request that is done.
    """

    daemon_threads = True

    def __init__(
        self,
        address: tuple[str, int],
        engine: Engine,
        defaults: Defaults,
        *,
        key: str | None = None,
        most_waiting: int = 64,
        on_request: Callable[[str], None] | None = None,
    ) -> None:
        self.engine, self.defaults, self.key, self.on_request = engine, defaults, key, on_request
        self.queue = Queue(most_waiting)
        self._connections: dict[threading.Thread, socket.socket] = {}
        self.made = int(time.time())
        self.local = address[0] in LOOPBACK
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Without the look-up of the host's name that the base class makes."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is no error of ours; everything else is printed as the base class does."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, as the base class does; it is remembered while it runs."""
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        self._connections[thread] = request
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole life of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.pop(threading.current_thread(), None)

    def stop(self, seconds: float = 10.0) -> None:
        """After `serve_forever` has ended: break off what is answered, and close.

        The threads are waited for: one that is inside of torch when the interpreter ends would abort the process.
        """
        deadline = time.monotonic() + seconds
        self.queue.close(seconds)
        self.server_close()
        for thread, connection in list(self._connections.items()):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # a client that keeps its connection open is not waited for
            with suppress(RuntimeError):  # the signal came before it was started
                thread.join(max(0.0, deadline - time.monotonic()))


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: ModelServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "unsloth-factory", ""
    timeout = 120  # seconds that a client may be silent in the middle of a request

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are told through `on_request`."""

    def do_GET(self) -> None:
        """Models and health."""
        with _refusing(self):
            self._admit()
            path = self.path.split("?")[0].rstrip("/")
            entry = {"id": self.server.defaults.model, "object": "model", "created": self.server.made}
            entry |= {"owned_by": "unsloth-factory"}
            if path == "/v1/models":
                return self._json(200, {"object": "list", "data": [entry]})
            if path == f"/v1/models/{self.server.defaults.model}":
                return self._json(200, entry)
            if path == "/health":
                return self._json(200, {"status": "ok"})
            raise RequestError(404, f"There is no {path}. GET /v1/models; POST {', '.join(READERS)}.")

    def do_POST(self) -> None:
        """Answers."""
        started = time.monotonic()
        with _refusing(self):
            self._admit()
            path = self.path.split("?")[0].rstrip("/")
            body = self._body()
            if path not in READERS:
                raise RequestError(404, f"There is no {path}. POST goes to {', '.join(READERS)}.")
            job = READERS[path](body, self.server.defaults)
            prompt = self.server.engine.prompt(job)
            with self.server.queue.turn(self._gone):
                answer = self.server.engine.answer(job, prompt, self._broken_off)
                try:
                    with closing(answer):
                        ending = (self._stream if job.streaming else self._whole)(job, answer)
                except UserError as error:  # the prompt was fine: it is not the client's fault
                    raise RequestError(500, str(error), kind="server_error") from error
            if self.server.on_request:
                seconds = time.monotonic() - started
                self.server.on_request(
                    f"{path}: {ending.usage.prompt} -> {ending.usage.completion} tokens, {ending.reason}, "
                    f"{seconds:.1f} s"
                )

    def _admit(self) -> None:
        """Only for whom the server is: no page of a browser under another name, no one without the key."""
        host = (self.headers.get("Host") or "").lower()
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if self.server.local and name not in LOOPBACK:
            raise RequestError(403, "This server answers on this machine alone (Host must be localhost or 127.0.0.1).")
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip()
        if self.server.key and not hmac.compare_digest(given.encode(), self.server.key.encode()):
            raise RequestError(401, "The key is wrong or missing (Authorization: Bearer KEY).", code="invalid_api_key")

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length") or ""
        if not length.isdecimal():
            raise RequestError(411, "Content-Length is needed.")
        if int(length) > LARGEST_BODY:
            raise RequestError(413, f"The request has {length} bytes; at most {LARGEST_BODY} are read.")
        data = self.rfile.read(int(length))
        # A form of a foreign page can send text/plain without asking; it cannot send this.
        if (self.headers.get("Content-Type") or "").split(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "Content-Type: application/json is needed.")
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise RequestError(400, "The body is not a JSON object.")
        return value

    def _gone(self) -> bool:
        """The client has closed the connection."""
        with suppress(OSError):
            readable, _, _ = select.select([self.connection], [], [], 0)
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        return True

    def _broken_off(self) -> bool:
        return self.server.queue.closed or self._gone()

    def _whole(self, job: Job, answer: Iterator[StreamEvent | Ending]) -> Ending:
        texts: dict[str, list[str]] = {"thinking": [], "answer": [], "notice": []}
        ending = None
        for event in answer:
            if isinstance(event, Ending):
                ending = event
            else:
                texts[event.kind].append(event.text)
        assert ending is not None
        text, thinking = "".join(texts["answer"]), "".join(texts["thinking"])
        choice: dict[str, Any] = {"index": 0, "finish_reason": ending.reason, "logprobs": None}
        if job.is_chat:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            choice["message"] = message | ({"reasoning_content": thinking} if thinking else {})
        else:
            choice["text"] = text
        self._json(200, self._envelope(job, [choice]) | {"usage": _usage(ending)})
        return ending

    def _stream(self, job: Job, answer: Iterator[StreamEvent | Ending]) -> Ending:
        """Server-sent events; the connection's end is the body's end."""
        self.close_connection = True
        self.send_response(200)
        for name, value in (("Content-Type", "text/event-stream; charset=utf-8"), ("Cache-Control", "no-cache")):
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
        envelope = self._envelope(job, [], chunk=True)
        if job.is_chat:
            self._event(envelope | {"choices": [_delta({"role": "assistant", "content": ""})]})
        ending = None
        try:
            for event in answer:
                if isinstance(event, Ending):
                    ending = event
                    continue
                choice = _delta({"reasoning_content" if event.kind == "thinking" else "content": event.text})
                if not job.is_chat:
                    choice = {"index": 0, "text": event.text, "finish_reason": None}
                self._event(envelope | {"choices": [choice]})
        except UserError as error:  # the head is sent: the error can only come as an event
            self._event(RequestError(500, str(error), kind="server_error").to_dict())
            raise ConnectionAbortedError(str(error)) from error
        assert ending is not None
        last: dict[str, Any] = _delta({}) if job.is_chat else {"index": 0, "text": ""}
        self._event(envelope | {"choices": [last | {"finish_reason": ending.reason}]})
        if job.with_usage:
            self._event(envelope | {"choices": [], "usage": _usage(ending)})
        self.wfile.write(b"data: [DONE]\n\n")
        return ending

    def _envelope(self, job: Job, choices: list[dict[str, Any]], chunk: bool = False) -> dict[str, Any]:
        kind = "chat.completion" + (".chunk" if chunk else "") if job.is_chat else "text_completion"
        name = f"{'chatcmpl' if job.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        model = self.server.defaults.model
        return {"id": name, "object": kind, "created": int(time.time()), "model": model, "choices": choices}

    def refuse(self, error: RequestError) -> None:
        """Send an error; what is left of the request is not read."""
        self.close_connection = True
        headers = {"Connection": "close"} | ({"Retry-After": "5"} if error.status == 503 else {})
        with suppress(OSError):
            self._json(error.status, error.to_dict(), headers)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors of the base class (a broken request line, an unknown method), in the same form."""
        self.refuse(RequestError(int(code), message or "The request is not understood."))

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
        self.send_response(status)
        for name, text in {"Content-Type": "application/json; charset=utf-8", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def _refusing(handler: Handler) -> Iterator[None]:
    """What goes wrong in the block becomes an error in OpenAI's form; a client that left is forgotten."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        handler.close_connection = True
    except RequestError as error:
        handler.refuse(error)
    except UserError as error:
        handler.refuse(RequestError(400, str(error)))
    except Exception:
        handler.refuse(RequestError(500, "The server failed; its terminal says more.", kind="server_error"))
        raise


def _delta(delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": None}


def _usage(ending: Ending) -> dict[str, int]:
    prompt, completion = ending.usage
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
