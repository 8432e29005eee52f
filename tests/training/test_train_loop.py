"""The loop as a whole: what a run writes, says, returns and refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from training_jobs import said, samples

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.training.loop import train
from unsloth_factory.training.reporting import progress as progress_module
from unsloth_factory.training.reporting.metrics import MetricsLog
from unsloth_factory.training.reporting.plot import smoothed
from unsloth_factory.training.reporting.progress import Progress, duration


def test_a_run_leaves_everything_behind(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path / "run", eval_items=samples(4, seed=9), plot=True)
    result = train(job)
    run = job.folder
    assert (result.steps, result.skipped_steps, result.resumed_from) == (10, 0, None)
    assert result.adapter_path == run.final_adapter
    names = {"SHA256SUMS", "adapter_model.safetensors", "adapter_config.json", "unsloth_factory.json"}
    assert {path.name for path in run.final_adapter.iterdir()} == names
    assert yaml.safe_load(run.manifest.read_text())["config"] == {"a": 1}
    assert run.template.read_text() == job.template.source
    assert json.loads(run.validation_split.read_text()) == {
        "messages": [
            {"role": "user", "content": "一"},
            {"role": "assistant", "content": "二", "reasoning_content": "三"},
        ],
        "source": "held.jsonl:1",
    }
    assert run.loss_plot.read_bytes().startswith(b"\x89PNG")
    assert job.store.steps() == [3, 9, 10]  # the best evaluation's and the last two
    checkpoint = json.loads((run.path / "checkpoint-10" / "state.json").read_text())
    assert checkpoint["metrics_bytes"] == run.metrics.stat().st_size
    assert not list(run.path.glob(".*partial"))


def test_metrics_have_one_line_a_step(tmp_path: Path, job_in) -> None:
    rows = samples(18)
    job = job_in(tmp_path, train_items=rows, eval_items=samples(4, seed=9), run={"eval_steps": 4})
    result = train(job)
    lines = MetricsLog(job.folder.metrics).read()
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert set(lines[0]) == {
        "step", "epoch", "loss", "lr", "grad_norm", "tokens", "trained_tokens", "tokens_per_second", "memory", "time",
    }  # fmt: skip
    assert [line["step"] for line in lines if "eval_loss" in line] == [4, 8, 10]
    assert sum(line["tokens"] for line in lines) == result.tokens == 2 * sum(len(row.ids) for row in rows)
    assert result.trained_tokens == 2 * sum(int(row.trained[1:].sum()) for row in rows)
    assert [line["epoch"] for line in lines][4::5] == [1.0, 2.0]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert result.eval_loss == pytest.approx(lines[-1]["eval_loss"], rel=1e-6)
    best = min((line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line)
    assert (result.best_eval_loss, result.best_step) == (pytest.approx(best[0]), best[1])


def test_what_is_said_before_the_first_step(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, loop={"max_steps": 2})
    train(job)
    text = said(job)
    trainable, total = job.loaded.parameter_counts()
    for expected in (
        f"{trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %), lora",
        "18 to train on, 0 held out",
        "2 of 4 samples (2 packed into one row x 2)",
        "float32",
        "standard: ",
        "⟦",
        "step 1/2  loss",
        "ETA",
    ):
        assert expected in text


def test_full_training_writes_a_model(tmp_path: Path, job_in) -> None:
    tuning = TuningSettings(finetuning_type="full")
    result = train(job_in(tmp_path, tuning=tuning, loop={"max_steps": 1}))
    assert result.adapter_path == tmp_path / "final_model"
    assert (result.adapter_path / "model.safetensors").is_file()
    assert (result.adapter_path / "config.json").is_file()


def test_a_terminal_gets_one_live_line(tmp_path: Path, job_in) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True, force_jupyter=False)
    job = job_in(tmp_path, console=console, loop={"max_steps": 3})
    train(job)
    text = said(job)
    assert "3/3" in text
    assert "tok/s" in text
    assert "step 1/3" not in text


def test_plain_lines_follow_logging_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0, 110.0])  # start, then 4 s for 4 steps, then the last line
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    console = Console(file=io.StringIO(), width=200)
    with Progress(console, logging_steps=4) as progress:
        progress.start(0, 10)
        # (loss, speed) of the steps since the last line: the means of 1 and 2, of 1000 and 3000 per token
        for step, loss, speed in ((3, 1.0, 1000.0), (4, 2.0, 3000.0), (9, math.nan, 500.0), (10, 1.25, 500.0)):
            progress.step(step, loss=loss, rate=2e-4, tokens_per_second=speed, memory=3 * 2**29)
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "step 4/10  loss 1.5000  lr 2.00e-04  1,500 tok/s  1.50 GiB  ETA 6s",
        "step 10/10  loss 1.2500  lr 2.00e-04  500 tok/s  1.50 GiB  ETA 0s",
    ]


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59, 60, 192, 3600, 7505)] == ["0s", "59s", "1m00s", "3m12s", "1h00m", "2h05m"]


def test_smoothing_by_hand() -> None:
    # (0.5 * 4) / 0.5 = 4; (0.5 * 2 + 0.5 * 2) / 0.75; (0.5 * 2 + 0.5 * 6) / 0.875
    assert smoothed([4, 2, 6], weight=0.5) == pytest.approx([4, 2 / 0.75, 4 / 0.875])


def test_a_metrics_file_that_lost_lines(tmp_path: Path) -> None:
    log, warnings = MetricsLog(tmp_path / "metrics.jsonl"), []
    log.path.write_text('{"step": 1}\n{"st')
    log.start(1000, warnings.append)
    log.append({"step": 3, "loss": float("nan")})
    assert log.read() == [{"step": 1}, {"step": 3, "loss": None}]
    assert len(warnings) == 1


def test_nothing_to_train_on(tmp_path: Path, job_in) -> None:
    with pytest.raises(UserError, match="No training sample is left"):
        train(job_in(tmp_path, train_items=[]))


def test_an_unknown_tracker(tmp_path: Path, job_in) -> None:
    with pytest.raises(UserError, match="--report_to tensorbord: tensorbord is not installed"):
        train(job_in(tmp_path, run={"report_to": "tensorbord"}))
