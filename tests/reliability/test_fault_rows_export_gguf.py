"""Rows 37 to 40, 42 and 43 of the table of faults: damaged GGUF files, crashes of native code, an Ollama that fails."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.export import quantize as quantize_module
from unsloth_factory.export.gguf import load_template
from unsloth_factory.export.parity import ParityProbe, check_parity
from unsloth_factory.export.quantize import quantize
from unsloth_factory.inference.child import ChildProcess
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.run.atomic import verify_sums


def uf(*arguments: object, stdin: str = ""):
    from command_line import uf as run  # beside the tests of the command line

    return run(*arguments, stdin=stdin)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


DAMAGE = {
    "empty": lambda data: b"",
    "magic only": lambda data: data[:4],
    "another magic": lambda data: b"GGML" + data[4:],
    "version": lambda data: data[:4] + struct.pack("<I", 99) + data[8:],
    "tensor count": lambda data: data[:8] + struct.pack("<Q", 2**62) + data[16:],
    "entry count": lambda data: data[:16] + struct.pack("<Q", 2**62) + data[24:],
    "header cut": lambda data: data[:5000],
    "half": lambda data: data[: len(data) // 2],
    "4 kB missing": lambda data: data[:-4096],
    "a text of 2**60": lambda data: data[:24] + struct.pack("<Q", 2**60) + data[32:],
    "an array of 2**60": lambda data: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a")
    + struct.pack("<IIQ", 9, 4, 2**60) + data,
    "arrays in arrays": lambda data: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a")
    + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 50 + data,
    "49 bytes": lambda data: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"a") + struct.pack("<IIQ", 9, 9, 2**61),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(DAMAGE))
def test_fault_37_damaged_gguf(exported, tmp_path, kind):
    """Named in less than two seconds, before a native loader sees the file; every command says the same."""
    path = tmp_path / "x-f16.gguf"
    path.write_bytes(DAMAGE[kind](exported.gguf.read_bytes()))
    for call in (LlamaCpp, lambda p: quantize(p, tmp_path / "q", ["q8_0"])):
        started = time.monotonic()
        with pytest.raises(UserError, match=r"x-f16.gguf is not an intact GGUF file: .*SHA256SUMS"):
            call(path)
        assert time.monotonic() - started < 2
    assert os.listdir(tmp_path) == ["x-f16.gguf"]


def test_fault_37_a_sound_header_without_a_model(exported, tmp_path):
    """What only the loader can see is an error of the child, not of this process."""
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text(b"general.architecture") + struct.pack("<I", 8)
                     + text(b"nothing") + bytes(64))  # fmt: skip
    with pytest.raises(UserError, match=r"llama.cpp with x.gguf"):
        LlamaCpp(path)
    refused = uf("validate", "--run", exported.run, "--gguf", path, "--max_samples", 1)
    assert (refused.code, "Traceback" in refused.err) == (1, False), refused.err


def flipped(data: bytes) -> bytes:
    at = len(data) - 3000
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[:-5000] + bytes(5000)], ids=["flipped", "zeroed tail"])
def test_fault_38_damage_that_every_loader_accepts(exported, tmp_path, damage):
    """llama.cpp loads such a file with all its checks on; the SHA-256 beside it does not let it through."""
    run = shutil.copytree(exported.run, tmp_path / "run")
    for name in (exported.gguf.name, exported.quantized.name):
        path = run / "gguf" / name
        path.write_bytes(damage(path.read_bytes()))
    with LlamaCpp(run / "gguf" / exported.gguf.name) as llama:
        assert llama.generate([5, 6, 7], 2).ids  # nothing else would notice
    bad = run / "gguf" / exported.quantized.name
    for words in (
        ("quantize", "--run", run, "--types", "q4_0"),
        ("chat", "--gguf", bad),
        ("validate", "--run", run, "--gguf", bad, "--max_samples", 1),
        ("deploy", "--run", run, "--ollama_host", "127.0.0.1:9"),
    ):
        refused = uf(*words, stdin="hi\nexit\n")
        assert refused.code == 1, words
        assert "is not the file that was exported: its SHA-256 differs" in refused.err, words
    assert not list(run.glob("gguf/*q4_0*"))


DAMAGED = {
    "final_adapter/adapter_model.safetensors": (flipped, ("merge", "--output", "m")),
    "final_adapter/adapter_config.json": (lambda data: data.replace(b'alpha": 32', b'alpha": 92'), ("chat",)),
    "merged_model/model.safetensors": (flipped, ("gguf", "--output", "x.gguf")),
    "merged_model/tokenizer.json": (flipped, ("gguf", "--output", "x.gguf")),
}


@pytest.mark.parametrize("name", sorted(DAMAGED))
def test_fault_38_weights_and_adapters_too(exported, tmp_path, monkeypatch, name):
    """The same for what GGUF files are made from: one bit of the adapter, of its settings, of the merged model."""
    damage, words = DAMAGED[name]
    run = shutil.copytree(exported.run, tmp_path / "run")
    before = (run / name).read_bytes()
    (run / name).write_bytes(damage(before))
    assert (run / name).read_bytes() != before
    monkeypatch.chdir(tmp_path)
    refused = uf(words[0], "--run", run, *words[1:], stdin="hi\nexit\n")
    assert refused.code == 1
    assert f"{name} is not the file that was written: its SHA-256 differs" in refused.err
    assert os.listdir(tmp_path) == ["run"]


def test_fault_39_the_gate_compares_1000_texts_and_50_chats(exported):
    figures = json.loads((exported.run / "gguf" / "parity.json").read_text())["files"][exported.gguf.name]
    assert figures["texts"] == 1000
    assert figures["conversations"] >= 50
    assert (figures["token_parity"], figures["passed"]) == (True, True)


CHANGES = {
    "pre-tokenizer": (b"qwen2", b"gpt-2", "gate token parity failed"),
    "template": (b"<|im_start|>assistant", b"<|im_start|>Assistant", "gate prompt parity failed"),
}


@pytest.mark.parametrize("kind", sorted(CHANGES))
def test_fault_39_tokenizer_or_template_differs(exported, tmp_path, kind):
    """A file that splits or renders text otherwise than the training did does not pass."""
    before, after, message = CHANGES[kind]
    data = exported.gguf.read_bytes()
    assert before in data
    path = tmp_path / "x-f16.gguf"
    path.write_bytes(data.replace(before, after))
    # One piece for Qwen2's pattern and a token of this small vocabulary; GPT-2's pattern cuts behind the mark.
    question = (Turn("user", "高血压患者平时需要注意什么？应低盐饮食，按时服药，并定期测量血压。"),)
    template = load_template(exported.merged)
    probe = ParityProbe(folder=exported.merged, template=template, outtype="f16", thinking="off", questions=(question,))
    with LlamaCpp(path, exact=True) as llama, pytest.raises(UserError, match=message):
        check_parity(llama, probe, {})


CRASHING = """
import os, sys
from unsloth_factory.inference.child import serve
def quantize(request, send):
    open(request["target"], "wb").write(b"half a file")
    sys.stderr.write("GGML_ASSERT(false) failed\\n"); sys.stderr.flush()
    os.abort()
if __name__ == "__main__": serve({"quantize": quantize})
"""


def test_fault_40_native_crash_in_the_quantiser(exported, tmp_path, monkeypatch):
    """The step fails with the signal's name and the last words; what was there stays, and the next try succeeds."""
    (tmp_path / "crashing_quantiser.py").write_text(CRASHING)
    folder = tmp_path / "q"
    folder.mkdir()
    (folder / exported.quantized.name).write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
        patch.setattr(
            quantize_module, "ChildProcess", lambda _, what, **limits: ChildProcess("crashing_quantiser", what)
        )
        with pytest.raises(UserError, match=r"(?s)quantising to q8_0: the process was killed by SIGABRT.*GGML_ASSERT"):
            quantize(exported.gguf, folder, ["q8_0"], threads=1)
    assert os.listdir(folder) == [exported.quantized.name]
    assert (folder / exported.quantized.name).read_bytes() == b"old"
    quantize(exported.gguf, folder, ["q8_0"], threads=1)
    assert verify_sums(folder) == []


def test_fault_40_native_crash_of_the_program(exported, tmp_path, monkeypatch):
    program = tmp_path / "llama-quantize"
    program.write_text("#!/bin/sh\necho half > \"$2\"\necho 'loading' >&2\nkill -SEGV $$\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(quantize_module, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="llama-quantize was killed by SIGSEGV: loading"):
        quantize(exported.gguf, tmp_path / "q", ["q8_0"])
    assert os.listdir(tmp_path / "q") == []


def test_fault_42_llama_cpp_dies_in_the_middle_of_an_answer(exported, monkeypatch):
    """The answer ends with an error that names the signal; the next question is answered by a new process."""
    generate, calls = LlamaCpp.generate, []

    def killing(self, *args, **options):
        calls.append(1)
        if len(calls) == 3:
            os.kill(self._decoder.pid, signal.SIGKILL)
        return generate(self, *args, **options)

    monkeypatch.setattr(LlamaCpp, "generate", killing)
    outcome = uf("chat", "--gguf", exported.quantized, "--max_new_tokens", 6, stdin="你好\n还在吗？\nexit\n")
    assert outcome.code == 0
    assert outcome.err.count("error:") == 1
    assert "the process was killed by SIGKILL (SIGKILL often means that the memory ran out)" in outcome.words
    assert len(calls) > 5  # tokens of the second answer


class Ollama(ThreadingHTTPServer):
    """Blobs by digest and /api/create, in the mood that `mode` says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.blobs: set[str] = set()
        self.uploads, self.created, self.mode = 0, 0, "fine"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Answer(BaseHTTPRequestHandler):
    server: Ollama

    def log_message(self, *_: object) -> None:
        pass

    def reply(self, code: int, *lines: bytes, missing: int = 0) -> None:
        body = b"".join(line + b"\n" for line in lines)
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + missing))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply(200, b'{"version": "0.99"}')

    def do_HEAD(self) -> None:
        self.reply(200 if self.path.rpartition(":")[2] in self.server.blobs else 404)

    def do_POST(self) -> None:
        mode, size = self.server.mode, int(self.headers["Content-Length"])
        if "/api/blobs/" in self.path:
            self.server.uploads += 1
            if mode == "cut upload":
                self.rfile.read(size // 2)
                return self.connection.close()
            digest = hashlib.sha256(self.rfile.read(size)).hexdigest()
            if mode == "digest mismatch" or digest != self.path.rpartition(":")[2]:
                return self.reply(400, b'{"error": "digest mismatch"}')
            self.server.blobs.add(digest)
            return self.reply(201)
        self.rfile.read(size)
        if mode == "error in the stream":
            return self.reply(200, b'{"status": "parsing"}', b'{"error": "invalid file magic"}')
        if mode == "cut stream":
            return self.reply(200, b'{"status": "parsing"}', missing=100)
        if mode == "no json":
            return self.reply(200, b"<html>proxy error</html>")
        self.server.created += 1
        return self.reply(200, b'{"status": "success"}')


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("digest mismatch", "refuses .*400 digest mismatch"),
        ("cut upload", "POST /api/blobs/sha256:[0-9a-f]+ broke off.*run uf deploy again"),
        ("error in the stream", "cannot create x: invalid file magic"),
        ("cut stream", "broke off|ended without success"),
        ("no json", "cannot create x: it answers .*proxy error"),
    ],
)
def test_fault_43_ollama(exported, mode, message):
    """A failed create is a failed command; repeating it succeeds, and what arrived is not sent again."""
    server = Ollama()
    words = ("deploy", "--run", exported.run, "--name", "x", "--ollama_host", f"127.0.0.1:{server.server_port}")
    server.mode = mode
    failed = uf(*words)
    assert (failed.code, server.created) == (1, 0), failed.out
    assert re.search(message, failed.words), failed.words
    arrived, server.mode = len(server.blobs), "fine"
    for _ in range(2):
        assert uf(*words).code == 0
    assert (server.created, server.uploads) == (2, 1 if arrived else 2)
    server.shutdown()
    server.server_close()
