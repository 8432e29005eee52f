"""`uf serve` on the finished run: the answers of `uf validate`, through HTTP, from the adapter and from a GGUF file."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from command_line import uf
from rich.console import Console

from unsloth_factory.commands import serve
from unsloth_factory.commands.source import resolve_source
from unsloth_factory.config.commands import ServeConfig
from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.inference.endpoint import Endpoint


@contextmanager
def served(folder: Path, **settings):
    """The command's server in this process, on a free port; gives its address and its name."""
    config = ServeConfig(source=FinishedRun(run=str(folder)), port=0, **settings)
    console = Console(stderr=True, quiet=True)
    resolved = resolve_source(config.source, ModelSettings())
    with serve.open_engine(config, resolved, console) as engine:
        server = serve.open_server(config, resolved, engine, console)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1", server
        finally:
            server.shutdown()
            server.stop()


def records(folder: Path, name: str) -> list[dict]:
    path = folder / "validation_results" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("gguf", "name", "variant"), [(None, "samples", "tuned"), ("f16", "gguf_samples", "f16")])
def test_the_server_answers_as_the_validation_did(chain, gguf, name, variant):
    path = next((chain.folder / "gguf").glob(f"*-{gguf}.gguf")) if gguf else None
    with served(chain.folder, gguf=str(path) if path else None) as (url, server):
        endpoint = Endpoint(url)
        assert endpoint.model == (path.stem if path else "医生 1")
        for record in records(chain.folder, f"{name}.jsonl"):
            reply = endpoint.chat([{"role": "user", "content": record["question"]}], max_tokens=24)
            assert reply.text.strip() == record[variant]["answer"]
            assert reply.completion_tokens == record[variant]["tokens"]
            assert reply.finished == record[variant]["stopped"]
        assert server.defaults.system  # as trained


def test_the_server_is_validated_and_judges_like_any_other(chain, tmp_path):
    with served(chain.folder) as (url, _):
        run = ("--run", chain.folder, "--save_dir", tmp_path)
        outcome = uf("validate", *run, "--endpoint", url, "--max_new_tokens", 24, "--max_samples", 4)
        assert outcome.code == 0, outcome.err
        ours = json.loads((tmp_path / "endpoint.json").read_text(encoding="utf-8"))
        local = json.loads((chain.folder / "validation_results/validation.json").read_text(encoding="utf-8"))
        mine, theirs = ours["metrics"]["医生 1"], local["metrics"]["tuned"]
        for metric in ("exact match", "token F1", "answer tokens", "stopped by itself", "term coverage"):
            assert mine[metric]["value"] == pytest.approx(theirs[metric]["value"]), metric
        judged = uf(
            "validate",
            *run,
            "--endpoint",
            url,
            "--judge",
            url,
            "--judge_mode",
            "pointwise",
            "--judge_max_new_tokens",
            8,
        )
        assert judged.code == 0, judged.err
        assert "judge 医生 1: 4 requests" in judged.words
    report = json.loads((tmp_path / "endpoint_judge.json").read_text(encoding="utf-8"))
    assert report["details"]["requests"]["failed"] == 0


def test_ctrl_c_ends_it_cleanly_in_the_middle_of_an_answer(chain):
    command = [sys.executable, "-m", "unsloth_factory.cli", "serve", "--run", str(chain.folder), "--port", "0"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits SIG_IGN
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "answers at" in line)
        endpoint = Endpoint(re.findall(r"http://\S+/v1", line)[0])
        messages = [{"role": "user", "content": "你好"}]
        assert endpoint.chat(messages, max_tokens=2).completion_tokens <= 2
        asking = threading.Thread(target=lambda: _until_it_is_gone(endpoint, messages), daemon=True)
        asking.start()
        time.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert time.monotonic() - started < 10
        assert process.returncode == 0, err
        assert "stopping" in out
        assert "Traceback" not in err
        asking.join(5)
        assert not asking.is_alive()
    finally:
        process.kill()


def _until_it_is_gone(endpoint: Endpoint, messages: list[dict]) -> None:
    """One request after the other, so that one is under way whenever the signal comes."""
    with suppress(OSError, http.client.HTTPException):
        while True:
            endpoint._request("/chat/completions", {"messages": messages, "max_tokens": 3000, "temperature": 2.0})


def test_ports_that_cannot_be_had(chain):
    with served(chain.folder) as (_, server):
        config = ServeConfig(port=server.server_port)
        with pytest.raises(UserError, match="Another program has the port"):
            serve.open_server(config, resolve_source(FinishedRun(run=str(chain.folder)), ModelSettings()), None, None)
    outcome = uf("serve", "--run", chain.folder, "--port", 70000)
    assert outcome.code == 2
    assert "--port 70000" in outcome.err
