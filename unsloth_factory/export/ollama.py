"""Create a model in a running Ollama through its REST interface: blobs by digest, then /api/create.

Plain HTTP to the address that the user names and nowhere else: no proxy, no redirect.
"""

from __future__ import annotations

import http.client
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export.modelfile import OllamaModel
from unsloth_factory.export.progress import byte_progress, say
from unsloth_factory.export.sums import verify_file

DEFAULT_PORT = 11434
NAME = re.compile(r"(?a:[\w][\w.-]{0,79}(/[\w][\w.-]{0,79}){0,2}(:[\w][\w.-]{0,79})?)")
UPLOAD_CHUNK = 1 << 20
CREATE_TIMEOUT = 3600.0


def check_name(name: str) -> str:
    """A model name that Ollama takes.

    Raises:
        UsageError: It is none.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"--name {name!r}: Ollama takes letters, digits, . _ - and one :tag, such as my-model:q4_k_m.")
    return name


class OllamaServer:
    """Address of a server; each request has a connection of its own."""

    def __init__(self, host: str | None = None) -> None:
        """Read the address.

        Args:
            host: As OLLAMA_HOST takes it (host:port, URL); None reads that variable, else this machine.

        Raises:
            UsageError: It is no address.
        """
        text = host or os.environ.get("OLLAMA_HOST") or "127.0.0.1"
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            port = parts.port or (
                443 if parts.scheme == "https" else 80 if "://" in text and not parts.port else DEFAULT_PORT
            )
        except ValueError:
            raise UsageError(f"--ollama_host {text}: not an address such as 127.0.0.1:{DEFAULT_PORT}.") from None
        if parts.scheme not in ("http", "https"):
            raise UsageError(f"--ollama_host {text}: only http and https are spoken.")
        # 0.0.0.0 is where a server listens; one connects to it on the loopback address.
        name = "127.0.0.1" if parts.hostname in (None, "", "0.0.0.0") else parts.hostname
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.address = f"{parts.scheme}://{name}:{port}"
        self._connect: Callable[[float], http.client.HTTPConnection] = lambda timeout: kind(name, port, timeout=timeout)

    @contextmanager
    def _request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = 60.0
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect(timeout)
        try:
            connection.request(method, path, body, headers or {})
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"Ollama at {self.address}: {method} {path} broke off: {error}. Nothing is lost: run uf deploy again, "
                "files that arrived are not sent twice."
            ) from error
        finally:
            connection.close()

    def version(self) -> str | None:
        """Version of the server, None when nobody answers."""
        try:
            with self._request("GET", "/api/version", timeout=3.0) as response:
                return json.loads(response.read()).get("version", "unknown") if response.status == 200 else None
        except (UserError, ValueError):
            return None

    def upload(self, path: Path, digest: str) -> bool:
        """Send a file unless the server has it; true when it was sent.

        Raises:
            UserError: The server refuses it, or the connection breaks.
        """
        blob = f"/api/blobs/sha256:{digest}"
        with self._request("HEAD", blob) as response:
            if response.status == 200:
                return False
        size = path.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with open(path, "rb") as file, byte_progress(f"sending {path.name}", size) as advance:
            chunks = _chunks(file, advance)
            with self._request("POST", blob, chunks, headers, timeout=CREATE_TIMEOUT) as response:
                if response.status not in (200, 201):
                    raise UserError(f"Ollama at {self.address} refuses {path.name}: {_reason(response)}")
        return True

    def create(self, name: str, gguf: Path, model: OllamaModel, *, digest: str | None = None) -> None:
        """Create or replace a model.

        Args:
            name: Its name in Ollama.
            gguf: The file, compared with SHA256SUMS unless its `digest` is given.
            model: What Ollama has to know beside the weights.
            digest: SHA-256 of the file; the server compares it with what arrives.

        Raises:
            UserError: Any step failed. Ollama reports errors inside a stream that began with status 200.
        """
        digest = digest or verify_file(gguf)
        self.upload(gguf, digest)
        body: dict[str, Any] = {"model": check_name(name), "files": {gguf.name: f"sha256:{digest}"}, "stream": True}
        body |= {"parameters": model.parameters}
        if model.template is not None:
            body["template"] = model.template
        if model.system:
            body["system"] = model.system
        last: dict[str, Any] = {}
        headers = {"Content-Type": "application/json"}
        with self._request("POST", "/api/create", json.dumps(body).encode(), headers, CREATE_TIMEOUT) as response:
            if response.status != 200:
                raise UserError(f"Ollama at {self.address} cannot create {name}: {_reason(response)}")
            for line in response:
                if not line.strip():
                    continue
                last = _status(line)
                if "error" in last:
                    raise UserError(f"Ollama at {self.address} cannot create {name}: {last['error']}")
                if last.get("status"):
                    say(f"ollama: {last['status']}")
        if last.get("status") != "success":
            raise UserError(f"Ollama at {self.address}: creating {name} ended without success ({last or 'no answer'}).")


def _chunks(file: Any, advance: Callable[[int], None]) -> Iterator[bytes]:
    while piece := file.read(UPLOAD_CHUNK):
        advance(len(piece))
        yield piece


def _status(line: bytes) -> dict[str, Any]:
    """One line of the answer's stream; what is no JSON object is an error of the server."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"error": f"it answers {line[:200].decode('utf-8', 'replace')!r}"}


def _reason(response: http.client.HTTPResponse) -> str:
    text = response.read(2000).decode("utf-8", "replace").strip()
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]
    return f"{response.status} {text}"
