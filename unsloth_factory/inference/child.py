"""Native code in a child process: a crash there is a failed step with the signal's name, not the end of the factory.

Parent and child talk over the child's stdin and stdout: one JSON object a line. A reply may announce `bytes: N`, then N
raw bytes follow (arrays). Replies with an `event` key may come before the last one. What native code prints goes to a
temporary file, whose end is quoted when something fails.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
Handler = Callable[[dict, Callable[[dict], None]], "dict | tuple[dict, bytes]"]


def child_environment() -> dict[str, str]:
    """The parent's environment, offline, with this package importable wherever the parent found it."""
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


class ChildProcess:
    """One child running `python -m module`, asked one request after the other. A context manager."""

    def __init__(self, module: str, what: str) -> None:
        """Start the child.

        Args:
            module: Module whose main guard calls `serve`.
            what: What it does, for messages ("llama.cpp with model.gguf").
        """
        self.what = what
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        self._buffer = b""
        # -P: the folder in which the user stands must not shadow a library in the child.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=child_environment(),
            bufsize=0,
        )

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    def call(
        self, request: Mapping[str, Any], *, timeout: float, on_event: Callable[[dict], None] | None = None
    ) -> tuple[dict, bytes]:
        """Send one request and wait for its answer.

        Args:
            request: JSON object with the key `op`.
            timeout: Seconds after which the child is killed.
            on_event: Called with each reply that has an `event` key.

        Returns:
            The last reply and its raw bytes (empty when it announced none).

        Raises:
            UserError: The child reported an error, died, or took too long.
        """
        deadline = time.monotonic() + timeout
        self._send(json.dumps(request).encode() + b"\n")
        while True:
            reply = json.loads(self._read_line(deadline))
            if "event" not in reply:
                break
            if on_event:
                on_event(reply)
        if "error" in reply:
            raise UserError(f"{self.what}: {reply['error']}")
        return reply, self._read_exactly(reply.get("bytes", 0), deadline)

    def close(self) -> None:
        """End the child: its stdin is closed, and it is killed when that does not do."""
        if self._process.stdin and not self._process.stdin.closed:
            with suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._log.close()

    def log_tail(self, lines: int = 4) -> str:
        """The last lines that the child, or the native code in it, wrote to stderr."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 4000))
        text = self._log.read().decode("utf-8", "replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._process.stdin.fileno(), view) :]
        except BrokenPipeError:
            raise self._death() from None

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._buffer += self._receive(deadline)
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _read_exactly(self, count: int, deadline: float) -> bytes:
        pieces, have = [self._buffer[:count]], min(count, len(self._buffer))
        self._buffer = self._buffer[count:]
        while have < count:
            piece = self._receive(deadline)
            pieces.append(piece[: count - have])
            self._buffer = piece[count - have :]
            have += len(pieces[-1])
        return b"".join(pieces)

    def _receive(self, deadline: float) -> bytes:
        assert self._process.stdout is not None
        remaining = deadline - time.monotonic()
        if remaining <= 0 or not select.select([self._process.stdout], [], [], remaining)[0]:
            self._process.kill()
            self._process.wait()
            raise UserError(f"{self.what}: no answer in time, stopped. Last output:\n{self.log_tail()}")
        data = os.read(self._process.stdout.fileno(), 1 << 20)
        if not data:
            raise self._death()
        return data

    def _death(self) -> UserError:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = " (SIGKILL often means that the memory ran out)" if code == -signal.SIGKILL else ""
        return UserError(f"{self.what}: the process {how}{hint}. Last output:\n{self.log_tail()}")


def serve(handlers: Mapping[str, Handler]) -> None:
    """The child's side: answer requests until stdin closes.

    A handler takes (request, send_event) and returns the reply, or the reply and raw bytes. An exception in a handler
    becomes an error reply; its traceback goes to the log.
    """
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # native code that prints must not break the protocol

    def send(reply: dict, raw: bytes = b"") -> None:
        if raw:
            reply = {**reply, "bytes": len(raw)}
        channel.write(json.dumps(reply).encode() + b"\n" + raw)
        channel.flush()

    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            result = handlers[request["op"]](request, send)
        except Exception as error:  # the parent decides; a child that dies here would hide the reason
            traceback.print_exc()
            send({"error": f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"})
            continue
        send(*result) if isinstance(result, tuple) else send(result)
    os._exit(0)  # native destructors of a server can hang; everything was flushed
