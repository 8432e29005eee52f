"""From a GBK file to a quantised GGUF and its Modelfile, through the command line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT, SMALL, rows, uf, write_gbk
from safetensors.torch import load_file

from unsloth_factory.run.atomic import verify_sums

REFERENCE_FLAGS = (
    "--model tiny --domain medical --dataset {data} --dataset_format qa --output_dir {out} --epochs 1 "
    "--max_seq_length 256 --batch_size 4 --accumulation_steps 1 --dataloader_workers 2 --learning_rate 2e-4 "
    "--data_limit 8 --no_packing --lr_scheduler_type cosine --save_steps 1 --logging_steps 1 --resume auto --lora_r 4 "
    "--lora_alpha 8 --lora_dropout 0.1"
)


def as_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_run_folder_of_a_gbk_file(chain):
    names = {path.name for path in chain.folder.iterdir()}
    expected = "run.yaml data_report.json metrics.jsonl training_loss.png checkpoint-4 final_adapter "
    expected += "validation_results evaluation_results merged_model gguf Modelfile SHA256SUMS validation_split.jsonl"
    assert set(expected.split()) <= names
    assert "merge.json" not in names
    assert not [name for name in names if name.endswith(".partial")]
    manifest = yaml.safe_load((chain.folder / "run.yaml").read_text(encoding="utf-8"))
    assert (manifest["command"], manifest["model"], manifest["thinking"]) == ("sft", "tiny", "off")
    report = as_json(chain.folder / "data_report.json")
    expected = {"path": str(chain.data), "rows": 40, "used": 40, "format": "csv/qa", "encoding": "gbk"}
    assert report["files"] == [expected]
    steps = [json.loads(line) for line in (chain.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["step"] == 4
    held_out = (chain.folder / "validation_split.jsonl").read_text(encoding="utf-8").splitlines()
    asked = {turn["content"] for line in held_out for turn in json.loads(line)["messages"] if turn["role"] == "user"}
    assert len(asked) == 6
    assert asked <= {question for question, _ in rows(40)}


def test_sft_prints_what_it_trains(chain):
    out = chain.outcomes["sft"].out
    assert "303,104 of 4,631,040 parameters" in out
    assert "34 to train on, 6 held out" in out
    assert re.search(r"assistant\n<think>\n\n</think>\n\n⟦.+<\|im_end\|>⟧", out)
    assert shlex.quote(str(chain.folder)) in out.splitlines()[-1]


def test_validation_of_model_and_files(chain):
    results = chain.folder / "validation_results"
    report = as_json(results / "validation.json")
    assert list(report["metrics"]) == ["base", "tuned"]
    assert report["n"] == 4
    files = as_json(results / "gguf.json")
    assert list(files["metrics"]) == ["f16", "q8_0", "q4_k_m"]
    tuned = [json.loads(line)["tuned"]["answer"] for line in (results / "samples.jsonl").read_text().splitlines()]
    f16 = [json.loads(line)["f16"]["answer"] for line in (results / "gguf_samples.jsonl").read_text().splitlines()]
    assert tuned == f16


def test_evaluation_and_chat(chain):
    report = as_json(chain.folder / "evaluation_results" / "ceval.json")
    assert report["n"] == 20
    assert set(report["metrics"]) == {"base", "tuned"}
    chat = chain.outcomes["chat"]
    assert len(chat.out.strip().splitlines()) == 2
    assert "forgotten" in chat.err
    assert "<|im_end|>" not in chat.out


def test_merge_gguf_quantize(chain):
    figures = as_json(chain.folder / "merged_model" / "merge.json")
    assert figures["max_abs_logit_diff"] < 0.1
    parity = as_json(chain.folder / "gguf" / "parity.json")
    assert parity["token_parity"] is True
    (entry,) = parity["files"].values()
    assert entry["passed"] is True
    assert entry["kl_max"] <= 1e-4
    names = sorted(path.name for path in (chain.folder / "gguf").glob("*.gguf"))
    assert names == ["医生 1-f16.gguf", "医生 1-q4_k_m.gguf", "医生 1-q8_0.gguf"]
    for folder in (chain.folder, chain.folder / "gguf", chain.folder / "merged_model"):
        assert verify_sums(folder) == []


def test_deploy_without_a_server(chain):
    lines = [line.strip() for line in chain.outcomes["deploy"].out.splitlines()]
    modelfile = chain.folder / "Modelfile"
    assert [line for line in lines if line.startswith("ollama ")] == [
        f"ollama create doctor -f {shlex.quote(str(modelfile))}",
        "ollama run doctor --think=false",
    ]
    assert modelfile.read_text(encoding="utf-8").startswith("FROM ./gguf/医生 1-q4_k_m.gguf\n")


class Ollama(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None: ...

    def answer(self, code: int, body: dict | None = None) -> None:
        data = json.dumps(body or {}).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self.answer(200, {"version": "0.99"})

    def do_HEAD(self) -> None:
        self.answer(404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "/api/blobs/" in self.path:
            self.server.blob = hashlib.sha256(body).hexdigest()
            assert self.path.endswith(self.server.blob)
            return self.answer(201)
        self.server.created = json.loads(body)
        return self.answer(200, {"status": "success"})


def test_deploy_to_a_server(run_copy, monkeypatch):
    folder = run_copy("checkpoint-*", "merged_model")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ollama)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.server_port}")
    outcome = uf("deploy", "--run", folder)
    server.shutdown()
    server.server_close()
    assert outcome.code == 0
    assert "created run in Ollama 0.99" in outcome.words
    file = folder / "gguf" / "医生 1-q4_k_m.gguf"
    assert server.blob == hashlib.sha256(file.read_bytes()).hexdigest()
    assert server.created["files"] == {file.name: f"sha256:{server.blob}"}
    assert server.created["system"].startswith("你是一名严谨的医学健康助手")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_gbk(tmp_path_factory.mktemp("data") / "data.csv", 16)


def train(data: Path, out: Path, *flags: object) -> None:
    outcome = uf("sft", "--model", "tiny", "--dataset", data, "--output_dir", out, "--max_steps", 2, *SMALL, *flags)
    assert outcome.code == 0, outcome.err


def test_qlora_on_the_cpu_merges_onto_either_base(data, tmp_path):
    run = tmp_path / "run"
    train(data, run, "--quantization_bit", 4, "--val_split", 4)
    assert yaml.safe_load((run / "run.yaml").read_text(encoding="utf-8"))["quantization_bit"] == 4
    kinds = {}
    for kind in ("as_trained", "original"):
        outcome = uf("merge", "--run", run, "--base_weights", kind, "--output", tmp_path / kind)
        assert outcome.code == 0, outcome.err
        kinds[kind] = as_json(tmp_path / kind / "merge.json")
        assert kinds[kind]["base_weights"] == kind
        assert "quantization_config" not in as_json(tmp_path / kind / "config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["as_trained", "original", "run"]
    first, second = (load_file(tmp_path / kind / "model.safetensors") for kind in kinds)
    assert any((first[name] != second[name]).any() for name in first)
    outcome = uf("merge", "--run", run, "--compare_base_weights")
    assert outcome.code == 0, outcome.err
    losses = as_json(run / "merged_model" / "merge.json")["validation_losses"]
    assert set(losses) == {"as_trained", "original"}
    assert as_json(run / "merged_model" / "merge.json")["base_weights"] == min(losses, key=losses.get)


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_whole_weights_have_nothing_to_merge(data, tmp_path, kind):
    run = tmp_path / kind
    train(data, run, "--finetuning_type", kind, "--freeze_last_n", 1)
    outcome = uf("merge", "--run", run)
    assert outcome.code == 0
    assert "nothing to merge" in outcome.words
    outcome = uf("gguf", "--run", run, "--no_check")
    assert outcome.code == 0, outcome.err
    assert (run / "gguf" / f"{kind}-f16.gguf").is_file()
    outcome = uf("validate", "--run", run, "--dataset", data, "--max_samples", 2, "--max_new_tokens", 8)
    assert outcome.code == 0, outcome.err
    assert list(as_json(run / "validation_results" / "validation.json")["metrics"]) == ["tuned"]


def start(command: list[str]) -> subprocess.Popen:
    # As many threads as here: sums in another order would differ in their last bits.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, "cli.py", *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_reference_flags_then_sigterm_then_resume(data, tmp_path):
    """`python cli.py sft` with the reference's flags; stopped and continued, it ends with the same bits."""
    flags = {name: REFERENCE_FLAGS.format(data=data, out=tmp_path / name).split() for name in ("whole", "parts")}
    more = ["--epochs", "4", "--val_split", "0", "--save_steps", "1000"]
    process = start(["sft", *flags["parts"], *more, "--logging_steps", "1"])
    metrics = tmp_path / "parts" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and (not metrics.is_file() or len(metrics.read_text().splitlines()) < 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "--resume auto" in out + err
    assert not (tmp_path / "parts" / "final_adapter").exists()
    (checkpoint,) = (tmp_path / "parts").glob("checkpoint-*")
    assert 2 <= int(checkpoint.name.split("-")[1]) < 8
    for name in flags:  # "whole" from step 0, "parts" from where it stopped
        outcome = uf("sft", *flags[name], *more)
        assert outcome.code == 0, outcome.err
    first, second = ((tmp_path / name / "final_adapter/adapter_model.safetensors").read_bytes() for name in flags)
    assert first == second
    config = yaml.safe_load((tmp_path / "whole" / "run.yaml").read_text(encoding="utf-8"))["config"]
    assert (config["tuning"]["lora_r"], config["loop"]["no_packing"], config["data"]["data_limit"]) == (4, True, 8)
