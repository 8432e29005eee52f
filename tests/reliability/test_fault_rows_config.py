"""Rows 33, 34, 44 and 45 of the table of faults: settings, the system around the program, and names of files."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

from command_line import ROOT, SMALL, Outcome, uf  # noqa: E402

from unsloth_factory.config.commands import ChatConfig, SftConfig  # noqa: E402
from unsloth_factory.config.errors import UsageError  # noqa: E402
from unsloth_factory.config.parse import parse  # noqa: E402

ROWS = [{"instruction": f"问题{i}？", "output": f"回答{i}。"} for i in range(8)]


def write_rows(path: Path) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    return path


def sft(model: Path, data: Path, out: Path, *flags: object, code: int = 0) -> Outcome:
    line = ("sft", "--model", model, "--dataset", data, "--output_dir", out, "--val_split", 0, *SMALL)
    outcome = uf(*line, *(flags or ("--max_steps", 1)))
    assert outcome.code == code, outcome.out + outcome.err
    return outcome


def settings(path: Path, text: str) -> SftConfig:
    path.write_text(text, encoding="utf-8")
    return parse(SftConfig, [str(path)]).config


def test_fault_33_yaml_surprises(tmp_path):
    """What YAML reads as something else is converted by the setting's type, or refused with file and line."""
    job = tmp_path / "job.yaml"
    config = settings(
        job,
        "learning_rate: 1e-4\nlora_alpha: 1_6\nno_packing: yes\nbatch_size: 4.0\nseed: 9007199254740993\n"
        "model: 1.10\ndataset: 2024-01-01\nsystem: 'no'\nlora_r: 0x10\nreport_to: 007\ndata_limit: ~\n",
    )
    assert config.loop.learning_rate == 1e-4
    assert (config.tuning.lora_alpha, config.tuning.lora_r) == (16.0, 16)
    assert config.loop.no_packing is True
    assert (config.loop.batch_size, config.loop.seed) == (4, 9007199254740993)
    assert (config.model.model, config.data.dataset, config.data.system) == ("1.10", "2024-01-01", "no")
    assert config.run.report_to == "007"
    assert config.data.data_limit is None
    for text, line, message in (
        ("epochs: 1\nlora_r: 012\n", 2, "012 is 10 in YAML 1.1 and 12 in YAML 1.2"),
        ("epochs: 1\nmodel: m\nepochs: 2\n", 3, "key 'epochs' stands twice (lines 1 and 3)"),
        ("columns:\n  prompt: a\n  prompt: b\n", 3, "key 'prompt' stands twice (lines 2 and 3)"),
        ("model: m\nsystem: no\n", 2, "put it in quotes"),
        ("\n\nepochs: on\n", 3, "not true/false"),
        ("# x\nbatch_size: 1:30\n", 2, "1:30: must be a number"),
        ("model: m\nepochs: 0\n", 2, "above 0"),
        ("model: m\nseed: 99999999999999999999\n", 2, "must lie within"),
    ):
        job.write_text(text, encoding="utf-8")
        outcome = uf("sft", job)
        assert outcome.code == 2
        assert f"{job}:{line}: " in outcome.err, outcome.err
        assert message in outcome.err


def test_fault_34_unknown_keys(tmp_path):
    """Every unknown key or flag is refused, all of them at once, each with the nearest name."""
    job = tmp_path / "job.yaml"
    job.write_text("model: m\nlearnig_rate: 1\nper_device_train_batchsize: 2\n", encoding="utf-8")
    outcome = uf("sft", job, "--lora-rr", 3, "--max-seq-len", 64, "zzz=1")
    assert outcome.code == 2
    for part in (
        f"{job}:2: learnig_rate: unknown setting. Did you mean learning_rate?",
        f"{job}:3: per_device_train_batchsize: unknown setting. Did you mean per_device_train_batch_size?",
        "--lora-rr: unknown setting. Did you mean lora_r?",
        "--max-seq-len: unknown setting. Did you mean max_seq_length?",
        "zzz: unknown setting.",
    ):
        assert part in outcome.err, outcome.err
    assert "Did you mean sft?" in uf("stf").err
    with pytest.raises(UsageError, match="Did you mean temperature"):
        parse(ChatConfig, ["--temprature", "1"])
    plan = tmp_path / "plan.yaml"
    plan.write_text("stages:\n  - merge: {}\n  - sft: {learnig_rate: 1}\n", encoding="utf-8")
    outcome = uf("run", plan)
    assert outcome.code == 2
    assert f"{plan}:3: sft: learnig_rate: unknown setting. Did you mean learning_rate?" in outcome.err


def test_fault_44_clock_jumps(tmp_path, random_model_dir, monkeypatch):
    """Times of day decide nothing: durations stay right, and the newest checkpoint is the one with the most steps."""
    source, real = random.Random(0), time.time
    monkeypatch.setattr(time, "time", lambda: real() + source.uniform(-1e7, 1e7))
    data, out = write_rows(tmp_path / "d.jsonl"), tmp_path / "out"
    job = ("--max_steps", 3, "--save_steps", 1, "--save_total_limit", 3)
    outcome = sft(random_model_dir, data, out, *job)
    weights = (out / "final_adapter" / "adapter_model.safetensors").read_bytes()
    assert int(re.search(r"Trained 3 steps in (-?\d+) s", outcome.words)[1]) in range(60)
    rates = [json.loads(line)["tokens_per_second"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(1 < rate < 1e6 for rate in rates), rates
    shutil.rmtree(out / "final_adapter")
    shutil.rmtree(out / "checkpoint-3")
    for step in (1, 2):  # the first looks newer than the second
        for path in (out / f"checkpoint-{step}", *(out / f"checkpoint-{step}").iterdir()):
            os.utime(path, (4e9 - step * 1e8, 4e9 - step * 1e8))
    outcome = sft(random_model_dir, data, out, *job, "--resume", "auto")
    assert "checkpoint-2 at step 2" in outcome.words
    assert (out / "final_adapter" / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which nobody can make files")
def test_fault_44_read_only_folders(tmp_path, random_model_dir):
    """A folder that cannot be written is refused by its name, before any work; one that is only read may be so."""
    data, out = write_rows(tmp_path / "d.jsonl"), tmp_path / "out"
    data.chmod(0o444)
    sft(random_model_dir, data, out)
    places = [Path("/proc/uf")]
    if os.geteuid() != 0:  # the superuser writes everywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        places.append(locked / "out")
    for place in places:
        outcome = sft(random_model_dir, data, place, code=1)
        assert str(place) in outcome.err
        for line in (("merge", "--output", place), ("validate", "--save_dir", place, "--dataset", data)):
            outcome = uf(line[0], "--run", out, *line[1:], *(("--max_new_tokens", 2) if line[0] == "validate" else ()))
            assert outcome.code == 1, outcome.out + outcome.err
            # /proc has no room either, and that is looked at first.
            assert str(place) in outcome.err or "in /proc, 0.00 GiB are free" in outcome.err
            assert "Traceback" not in outcome.err


ALONE = """
import json, os, pwd, socket, sys

asked = []

def refuse(name):
    def call(*arguments, **_):
        asked.append(f"{name} {arguments[-1] if arguments else ''}")
        raise OSError(101, "Network is unreachable")
    return call

def nobody(*_):
    raise KeyError("uid not found")

for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse(name))
for name in ("getaddrinfo", "gethostbyname", "create_connection"):
    setattr(socket, name, refuse(name))
pwd.getpwuid = nobody
from unsloth_factory.cli import main
codes = [main(line) for line in json.loads(sys.argv[1])]
print("RESULT", json.dumps([codes, asked]))
"""


def test_fault_44_no_home_no_user_no_network(tmp_path, random_model_dir):
    """Without HOME, without an entry in the users' file and without a network: trains, merges, answers, asks nobody."""
    data, out = write_rows(tmp_path / "d.jsonl"), tmp_path / "out"
    train = ["sft", "--model", random_model_dir, "--dataset", data, "--output_dir", out, "--max_steps", 1, *SMALL]
    lines = [
        train,
        ["validate", "--run", out, "--dataset", data, "--max_samples", 1, "--max_new_tokens", 2],
        ["merge", "--run", out],
        ["sft", "--model", "~nobody/model", "--dataset", "~/d.jsonl", "--output_dir", tmp_path / "no"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps([[str(word) for word in line] for line in lines])],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    found = next(line for line in result.stdout.splitlines() if line.startswith("RESULT"))
    assert json.loads(found.removeprefix("RESULT ")) == [[0, 0, 0, 1], []]


NAMES = {
    "blanks": "a  b c",
    "Chinese": "医生 一号",
    "emoji": "👩\u200d⚕️ 😀",
    "255 bytes": "长" * 85,
    "shell": 'it\'s "x"; touch y $(z) & #1',
    "decomposed": "cafe\u0301",
    "dots": "..hidden..",
}


@pytest.mark.parametrize("kind", [*NAMES, "symlink"])
def test_fault_45_names(tmp_path, random_model_dir, kind):
    """Data, run folder and merged model under any name, and nothing beside them."""
    home = tmp_path / NAMES.get(kind, "real")
    home.mkdir()
    if kind == "symlink":
        (tmp_path / "link").symlink_to(home)
        home = tmp_path / "link"
    assert kind != "255 bytes" or len(os.fsencode(home.name)) == 255
    ending = ".jsonl"
    data = write_rows(home / (home.name[: -3 if kind == "255 bytes" else None] + ending))
    run, merged = home / home.name, home / ("m" + home.name[1:])
    sft(random_model_dir, data, run)
    outcome = uf("merge", "--run", run, "--output", merged)
    assert outcome.code == 0, outcome.out + outcome.err
    assert (merged / "model.safetensors").is_file()
    if kind in ("shell", "255 bytes"):
        outcome = uf("validate", "--run", run, "--dataset", data, "--max_samples", 1, "--max_new_tokens", 2)
        assert outcome.code == 0, outcome.out + outcome.err
    assert sorted(path.name for path in home.iterdir()) == sorted({data.name, run.name, merged.name})
