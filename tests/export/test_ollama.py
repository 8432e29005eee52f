"""The REST client against a stub server: blobs by digest, errors inside a 200 stream, idempotent retry."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export.modelfile import OllamaModel
from unsloth_factory.export.ollama import OllamaServer, check_name
from unsloth_factory.export.sums import write_folder_sums


class Stub(ThreadingHTTPServer):
    """Enough of Ollama's blob and create routes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.blobs: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.uploads = 0
        self.mode = "fine"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *_) -> None:
        pass

    def reply(self, code: int, *lines: dict) -> None:
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + (50 if self.server.mode == "cut" else 0)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, {"version": "0.99"})

    def do_HEAD(self) -> None:
        self.reply(200 if self.path.rsplit(":", 1)[-1] in self.server.blobs else 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/sha256:"):
            self.server.uploads += 1
            digest = self.path.rsplit(":", 1)[-1]
            if hashlib.sha256(body).hexdigest() != digest or self.server.mode == "digest":
                return self.reply(400, {"error": "digest mismatch"})
            self.server.blobs[digest] = body
            return self.reply(201)
        self.server.created.append(json.loads(body))
        if self.server.mode == "error":
            return self.reply(200, {"status": "parsing GGUF"}, {"error": "supplied file was not in GGUF format"})
        if self.server.mode in ("silent", "cut"):
            return self.reply(200, {"status": "parsing GGUF"})
        return self.reply(200, {"status": "parsing GGUF"}, {"status": "success"})


@pytest.fixture
def stub():
    server = Stub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def gguf(tmp_path):
    path = tmp_path / "模型 q4.gguf"
    path.write_bytes(b"GGUF" + bytes(range(256)) * 9000)  # more than one chunk
    write_folder_sums(tmp_path, [path.name])
    return path


MODEL = OllamaModel("{{ .System }}", '你好\u3000全角\u200d """ "引号"', {"num_ctx": 4096, "stop": ["<|im_end|>"]})


def client(stub: Stub) -> OllamaServer:
    return OllamaServer(f"127.0.0.1:{stub.server_port}")


def test_create_keeps_every_character_and_sends_a_file_once(stub, gguf, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # never asked
    assert client(stub).version() == "0.99"
    for _ in range(2):
        client(stub).create("demo:q4_k_m", gguf, MODEL)
    assert stub.uploads == 1
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert stub.blobs[digest] == gguf.read_bytes()
    request = stub.created[0]
    assert request["system"] == MODEL.system
    assert request["template"] == MODEL.template
    assert request["parameters"]["stop"] == ["<|im_end|>"]
    assert request["files"] == {gguf.name: f"sha256:{digest}"}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("error", "supplied file was not in GGUF format"),
        ("silent", "ended without success"),
        ("digest", "refuses .*digest mismatch"),
        ("cut", "broke off|ended without success"),
    ],
)
def test_failures_are_failures(stub, gguf, mode, message):
    stub.mode = mode
    with pytest.raises(UserError, match=message):
        client(stub).create("demo", gguf, MODEL)
    stub.mode = "fine"
    client(stub).create("demo", gguf, MODEL)  # a retry succeeds


def test_a_changed_file_is_not_sent(stub, gguf):
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="SHA-256"):
        client(stub).create("demo", gguf, MODEL)
    assert stub.uploads == 0


def test_nobody_answers():
    server = Stub()
    port = server.server_port
    server.shutdown()
    server.server_close()
    assert OllamaServer(f"http://127.0.0.1:{port}").version() is None


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("https://ollama.example.org", "https://ollama.example.org:443"),
        ("http://box", "http://box:80"),
        (":1234", "http://127.0.0.1:1234"),
    ],
)
def test_addresses(host, address, monkeypatch):
    assert OllamaServer(host).address == address
    monkeypatch.setenv("OLLAMA_HOST", host)
    assert OllamaServer().address == address


def test_bad_addresses_and_names():
    for host in ("ftp://x", "127.0.0.1:99999"):
        with pytest.raises(UsageError, match="--ollama_host"):
            OllamaServer(host)
    for name in ("../x", "a b", "", "a" * 200, "x:y:z"):
        with pytest.raises(UsageError, match="--name"):
            check_name(name)
    assert check_name("me/model:q4_k_m")
