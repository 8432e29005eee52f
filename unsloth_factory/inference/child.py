"""Native code in a child process: a crash there is a failed step with the signal's name, not the end of the factory.

Parent and child talk over the child's stdin and stdout: one JSON object a line. A reply may announce `bytes: N`, then N
raw bytes follow (arrays). Replies with an `event` key may come before the last one. What native code prints goes to a
temporary file, whose end is quoted when something fails.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PARENT = "UNSLOTH_FACTORY_PARENT"
# Names that hold secrets; a child needs none. (TOKENIZERS_PARALLELISM is none: whole words only.)
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|(API|ACCESS|PRIVATE|SECRET)_?KEY)(_|$)", re.I)
Handler = Callable[[dict, Callable[[dict], None]], "dict | tuple[dict, bytes]"]


def child_environment() -> dict[str, str]:
    """The parent's environment without its secrets, offline, with this package importable where the parent found it."""
    kept = {name: value for name, value in os.environ.items() if not SECRET.search(name)}
    paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**kept, **offline, "PYTHONPATH": os.pathsep.join(paths), PARENT: str(os.getpid())}


def memory_limit(file_bytes: int) -> int:
    """Private memory, bytes, for native code that reads a file of that size.

    Twice the file (repacked weights) and 16 GiB for caches and libraries, but never more than the machine has: a
    hostile header then fails in the child before it fills the machine.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(machine, 2 * file_bytes + 16 * 2**30)


class ChildProcess:
    """One child running `python -m module`, asked one request after the other. A context manager."""

    def __init__(self, module: str, what: str, *, memory: int | None = None, inherited: tuple[int, ...] = ()) -> None:
        """Start the child.

        Args:
            module: Module whose main guard calls `serve`.
            what: What it does, for messages ("llama.cpp with model.gguf").
            memory: Limit of its private memory, bytes.
            inherited: Open descriptors that it holds too, such as a folder's lock.
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
            pass_fds=inherited,
        )
        if memory is not None and hasattr(resource, "prlimit"):  # Linux
            with suppress(ProcessLookupError):
                resource.prlimit(self._process.pid, resource.RLIMIT_DATA, (memory, memory))

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Process id of the child."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._process.poll() is None

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
        return UserError(f"{self.what}: the process {how_it_ended(code)}. Last output:\n{self.log_tail()}")


def how_it_ended(code: int) -> str:
    """An exit code in words; a signal by its name."""
    if code >= 0:
        return f"ended with exit code {code}"
    known = {int(member): member.name for member in signal.Signals}
    hint = " (SIGKILL often means that the memory ran out)" if code == -signal.SIGKILL else ""
    return f"was killed by {known.get(-code, f'signal {-code}')}{hint}"


def serve(handlers: Mapping[str, Handler]) -> None:
    """The child's side: answer requests until stdin closes.

    A handler takes (request, send_event) and returns the reply, or the reply and raw bytes. An exception in a handler
    becomes an error reply; its traceback goes to the log. The child ends with its parent, however that ends.
    """
    _end_with_parent()
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
            send({"error": _reason(error)})
            continue
        send(*result) if isinstance(result, tuple) else send(result)
    os._exit(0)  # native destructors of a server can hang; everything was flushed


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    if isinstance(error, OSError) and "requested and" in str(error):  # numpy: "131072 requested and 8976 written"
        return f"the file cannot be written, the disk is full or broken ({error})"
    if isinstance(error, MemoryError):
        return "the memory ran out"
    return f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """Native code that a killed parent left behind would go on writing its file for minutes.

    A thread watches the parent's id. (The kernel's own signal for this is sent when the *thread* that started us ends,
    which may be long before its process does.)
    """
    parent = int(os.environ.get(PARENT, "0"))
    if not parent:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
