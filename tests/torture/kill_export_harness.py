"""kill -9 at random instants of merge, convert, quantise and `ollama create`: the old artefact or the new, none torn.

Run as a program: python kill_export_harness.py FOLDER KILLS SEED. It imports the libraries once and forks a child for
each attempt; the parent runs no tensor operation, because a fork after OpenMP has started its threads hangs. Every run
begins with an older artefact under the final name. After each kill that name must hold the whole old or the whole new
artefact, agreeing with its SHA256SUMS; the attempt that is let through must end with the bytes of an undisturbed one,
with nothing left over. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
PRELOADED = (
    "torch", "peft", "accelerate", "bitsandbytes", "rich.progress", "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.auto.modeling_auto", "unsloth_factory.export.merge", "unsloth_factory.export.gguf",
    "unsloth_factory.export.quantize", "unsloth_factory.export.ollama", "unsloth_factory.model.load",
)  # fmt: skip
# Share of the kills: an attempt to convert starts a Python of its own, seconds each: none in a short test.
SHARES = {"merge": 0.4, "quantize": 0.3, "convert": 0.2, "create": 0.1}
FEW = 20
OLD = b"the artefact of an older training"


@dataclass
class Stage:
    """One export: how it is run, and where its artefact appears."""

    name: str
    job: Callable[[Path], None]
    """Run it in a folder."""
    artefact: str
    """Name of the file or folder that it publishes there."""
    expected: str = ""
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder's names and contents; "nothing" when it is not there."""
    if not path.exists():
        return "nothing"
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.relative_to(path.parent).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()


def put_old(stage: Stage, run: Path) -> str:
    """Put an older artefact under the final name, with its checksum; returns its digest."""
    from unsloth_factory.run.atomic import write_sums

    run.mkdir(parents=True)
    path = run / stage.artefact
    if stage.name == "merge":
        path.mkdir()
        (path / "model.safetensors").write_bytes(OLD)
        write_sums(path, ["model.safetensors"])
    elif stage.name != "create":
        path.write_bytes(OLD)
        write_sums(run, [stage.artefact])
    return digest_of(path)


def fault(stage: Stage, run: Path, old: str) -> str | None:
    """What is wrong with the artefact after a kill, or None."""
    from unsloth_factory.run.atomic import read_sums, sha256, verify_sums

    path = run / stage.artefact
    found = digest_of(path)
    if found not in (old, stage.expected):
        return f"{stage.artefact} is neither the old nor the new one"
    stage.counts["old" if found == old else "new"] += 1
    if stage.name == "merge" and verify_sums(path):
        return "the folder differs from its SHA256SUMS"
    if stage.name in ("convert", "quantize") and sha256(path) not in read_sums(run)[path.name]:
        return "the file agrees with no line of SHA256SUMS"
    return None


def forked(job: Callable[[], None], log: Path) -> int:
    """Run a job in a fork of this process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        job()
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def attempt(job: Callable[[], None], log: Path, kill_after: float | None) -> tuple[str, float]:
    """("done" | "killed" | "failed CODE", seconds) of one job that is killed after so many seconds, if at all."""
    started = time.monotonic()
    pid = forked(job, log)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if found:
            code = os.waitstatus_to_exitcode(status)
            return ("done" if code == 0 else f"failed {code}"), seconds
        if kill_after is not None and seconds >= kill_after:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "killed", seconds
        time.sleep(0.001)


def make_inputs(folder: Path) -> None:
    """An adapter with values for the bundled model."""
    import torch

    from unsloth_factory.config.settings import ModelSettings
    from unsloth_factory.model.load import load_model

    torch.set_num_threads(1)
    loaded = load_model(ModelSettings(model="tiny"), for_training=True, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    loaded.save_adapter(folder / "adapter")


def stages(folder: Path, address: str) -> list[Stage]:
    """The four exports, each reading the undisturbed result of the one before."""
    from unsloth_factory.export.gguf import GgufOptions, convert
    from unsloth_factory.export.merge import MergeOptions, merge
    from unsloth_factory.export.modelfile import OllamaModel
    from unsloth_factory.export.ollama import OllamaServer
    from unsloth_factory.export.quantize import quantize
    from unsloth_factory.model.paths import TINY_FOLDER

    inputs = folder / "reference"
    options = GgufOptions(check=False, name="x")
    model = OllamaModel(None, "你好", {"num_ctx": 4096})

    def run_merge(run: Path) -> None:
        merge(TINY_FOLDER, folder / "adapter", run / "merged", MergeOptions(overwrite=True, base_name="tiny"))

    def run_convert(run: Path) -> None:
        convert(inputs / "merge" / "merged", run / "x-f16.gguf", options)

    def run_quantize(run: Path) -> None:
        quantize(inputs / "convert" / "x-f16.gguf", run, ["q8_0"], threads=1)

    def run_create(run: Path) -> None:
        OllamaServer(address).create(f"killed-{run.name}", inputs / "quantize" / "x-q8_0.gguf", model)
        (run / "created").touch()

    return [
        Stage("merge", run_merge, "merged"),
        Stage("convert", run_convert, "x-f16.gguf"),
        Stage("quantize", run_quantize, "x-q8_0.gguf"),
        Stage("create", run_create, "created"),
    ]


def kill_stage(stage: Stage, folder: Path, kills: int, chooser: random.Random) -> None:
    """Kill until so many attempts of this stage have died; every run is then finished and compared."""
    log = folder / "log.txt"
    while stage.counts["kills"] < kills:
        stage.counts["runs"] += 1
        run = folder / stage.name / str(stage.counts["runs"])
        old = put_old(stage, run)
        while True:
            more = stage.counts["kills"] < kills
            after = chooser.uniform(0, 1.1 * stage.seconds) if more else None
            state, _ = attempt(lambda run=run: stage.job(run), log, after)
            if state == "killed":
                stage.counts["kills"] += 1
            if reason := fault(stage, run, old):
                stage.wrong.append(f"run {run.name}, {state}: {reason}")
            if state == "killed":
                continue
            names = set(os.listdir(run)) - {"SHA256SUMS"}
            if state != "done" or digest_of(run / stage.artefact) != stage.expected or names != {stage.artefact}:
                stage.wrong.append(f"run {run.name}: {state}, {sorted(names)}")
            break
        shutil.rmtree(run)


class Server(BaseHTTPRequestHandler):
    """Enough of Ollama in a process of its own: a blob is kept when all of it came and its digest agrees."""

    blobs: dict[str, int] = {}

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self, code: int, body: bytes = b"") -> None:
        """Send a reply."""
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Is the blob there?"""
        self.answer(200 if self.path.rpartition(":")[2] in self.blobs else 404)

    def do_DELETE(self) -> None:
        """Forget all blobs, so that the next run sends again."""
        self.blobs.clear()
        self.answer(200)

    def do_POST(self) -> None:
        """A blob, or a model of blobs that are all there."""
        with contextlib.suppress(OSError):
            size = int(self.headers["Content-Length"])
            body = self.rfile.read(size)
            if "/api/blobs/" in self.path:
                whole = hashlib.sha256(body).hexdigest() == self.path.rpartition(":")[2]
                if whole:
                    self.blobs[self.path.rpartition(":")[2]] = len(body)
                return self.answer(201 if whole else 400, b'{"error": "digest mismatch"}')
            wanted = json.loads(body)["files"].values() if len(body) == size else []
            known = wanted and all(name.rpartition(":")[2] in self.blobs for name in wanted)
            time.sleep(0.02)
            return self.answer(200, b'{"status": "success"}\n' if known else b'{"error": "no such blob"}\n')


def torture(folder: Path, kills: int, seed: int, address: str) -> dict[str, object]:
    """Undisturbed runs of all stages first; then the kills of each."""
    with contextlib.redirect_stdout(io.StringIO()):
        for name in PRELOADED:  # so that no child pays for them: what is killed is the export, not importing
            importlib.import_module(name)
    chooser, log = random.Random(seed), folder / "log.txt"
    state, _ = attempt(lambda: make_inputs(folder), log, None)
    assert state == "done", f"the adapter: {state}, see {log}"
    found = stages(folder, address)
    for stage in found:
        run = folder / "reference" / stage.name
        put_old(stage, run)
        state, stage.seconds = attempt(lambda run=run, stage=stage: stage.job(run), log, None)
        assert state == "done", f"{stage.name} undisturbed: {state}, see {log}"
        stage.expected = digest_of(run / stage.artefact)
    for stage in found:
        if stage.name != "convert" or kills >= FEW:
            kill_stage(stage, folder, max(1, round(SHARES[stage.name] * kills)), chooser)
    return {
        "kills": sum(stage.counts["kills"] for stage in found),
        "wrong": [f"{stage.name}: {text}" for stage in found for text in stage.wrong],
        "stages": {s.name: dict(s.counts) | {"seconds_a_run": round(s.seconds, 2)} for s in found},
    }


def main() -> None:
    """The server, or the torture with a server beside it."""
    if sys.argv[1] == "--server":
        server = HTTPServer(("127.0.0.1", 0), Server)
        print(server.server_port, flush=True)
        server.serve_forever()
    server = subprocess.Popen([sys.executable, __file__, "--server"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = f"127.0.0.1:{int(server.stdout.readline())}"
        print(json.dumps(torture(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), address)), flush=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
