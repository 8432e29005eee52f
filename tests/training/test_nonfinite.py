"""NaN and infinity: never applied, never saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training_jobs import metrics, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.config.settings import GuardSettings
from unsloth_factory.data.batching import StepPlan
from unsloth_factory.data.types import TokenSample
from unsloth_factory.training.checkpoints import tensors
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import LossSum, Sft
from unsloth_factory.training.pacing.schedule import learning_rate
from unsloth_factory.training.session import LoopState
from unsloth_factory.training.step import StepResult
from unsloth_factory.training.watch import guards


class Spoilt(Sft):
    """SFT whose loss is spoilt in some micro-batches (numbered from 1)."""

    def __init__(self, bad: Any, factor: float = math.nan) -> None:
        self.bad, self.factor, self.calls = bad, factor, 0
        self.named: list[str] = []

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        if self.calls not in self.bad:
            return part
        self.named.append(", ".join(batch.sources))
        return LossSum(part.total * self.factor, part.count)


def lines(job: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.folder.metrics.read_text().splitlines()]


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_one_bad_step_is_left_out(tmp_path: Path, job_in, factor: float) -> None:
    job = job_in(tmp_path, method=Spoilt({5}, factor), run={"save_steps": 1, "save_total_limit": 10})
    result = train(job)
    assert (result.steps, result.skipped_steps) == (10, 1)
    assert "step 3: loss" in said(job)
    assert "Samples: train.jsonl:" in said(job)
    assert lines(job)[2]["loss"] is None
    # No checkpoint while the last step is bad; weights of the steps around it are finite and differ.
    assert 3 not in job.store.steps()
    for file in job.folder.final_adapter.glob("*.safetensors"):
        assert all(torch.isfinite(t).all() for t in tensors.load_file(file).values())


def test_ten_in_a_row_go_back_once_and_then_stop(tmp_path: Path, job_in) -> None:
    method = Spoilt(range(9, 10_000))  # two micro-batches a step: bad from step 5 on
    job = job_in(tmp_path, method=method, loop={"max_steps": 40})
    with pytest.raises(UserError, match=r"10 steps in a row up to step 13 .*again after going back.*--learning_rate"):
        train(job)
    text = said(job)
    assert text.count("back to") == 1
    assert "checkpoint-3, once" in text  # bad are steps 5-14, and after it 4-13
    assert job.store.steps() == [3]
    assert [line["step"] for line in lines(job)] == list(range(1, 14))
    assert not job.folder.final_adapter.exists()


def test_nothing_applied_means_nothing_written(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spoilt(range(100)), loop={"max_steps": 3})
    with pytest.raises(UserError, match="None of the 3 steps had a finite loss"):
        train(job)
    assert not job.folder.final_adapter.exists()


FIFTY = {"loop": {"max_steps": 50}, "train_items": samples(20)}  # five steps an epoch, two micro-batches a step


def test_nan_in_1_of_50_batches_is_named_and_skipped_and_the_run_finishes(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spoilt({46}), run={"save_steps": 10}, **FIFTY)
    result = train(job)
    assert (result.steps, result.skipped_steps, result.rewound, result.end) == (50, 1, False, None)
    assert [line["step"] for line in lines(job)] == list(range(1, 51))
    assert [line["step"] for line in lines(job) if line["loss"] is None] == [23]
    warnings = [line for line in said(job).splitlines() if "not applied" in line]
    assert len(warnings) == 1
    # the two samples of the micro-batch, not the four of the step
    assert warnings[0].startswith("Warning: step 23: loss nan")
    assert warnings[0].endswith(f"Samples: {job.method.named[0]}")


def test_nan_in_10_of_50_batches_in_a_row_rewinds_and_the_run_finishes(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spoilt(range(45, 65)), run={"save_steps": 10}, **FIFTY)
    result = train(job)
    assert (result.steps, result.skipped_steps, result.rewound) == (50, 0, True)
    text = said(job)
    assert text.count("Samples: ") == 10
    assert "Warning: 10 bad steps in a row; back to" in text
    assert "checkpoint-20, once, and on with 0.5 times the learning rate" in text
    assert [line["step"] for line in lines(job)] == list(range(1, 51))
    assert all(line["loss"] is not None for line in lines(job))
    planned = [
        learning_rate(step, 50, peak=1e-2, shape="cosine", warmup_ratio=job.loop.warmup_ratio) for step in range(50)
    ]
    rates = [line["lr"] / rate for line, rate in zip(lines(job), planned, strict=True)]
    assert rates == pytest.approx([1.0] * 20 + [0.5] * 30, rel=1e-5)


def test_the_lower_rate_is_kept_by_a_resumed_run(tmp_path: Path, job_in) -> None:
    same: dict[str, Any] = {
        "train_items": samples(20),
        "loop": {"max_steps": 8},
        "guard": GuardSettings(max_bad_steps=2),
    }
    run = {"save_steps": 2}
    straight = job_in(tmp_path / "straight", method=Spoilt(range(5, 9)), run=run, **same)
    train(straight)
    with pytest.raises(Stopped):
        train(job_in(tmp_path / "run", method=stopping(Spoilt(range(5, 9)), 15), run=run, **same))
    resumed = job_in(tmp_path / "run", run=run | {"resume": "auto"}, **same)
    result = train(resumed)
    assert result.rewound
    assert weights(resumed) == weights(straight)
    assert metrics(resumed) == metrics(straight)


def test_stop_and_a_limit_of_ones_own(tmp_path: Path, job_in) -> None:
    guard = GuardSettings(max_bad_steps=3, on_bad_steps="stop")
    job = job_in(tmp_path, method=Spoilt(range(9, 1000)), guard=guard)
    with pytest.raises(UserError, match="3 steps in a row up to step 7 had a loss or gradient that is NaN"):
        train(job)
    assert "back to" not in said(job)
    assert job.store.steps() == [3]


def test_a_gradient_that_is_not_finite_names_the_whole_step(tmp_path: Path, job_in) -> None:
    class BadGradient(Spoilt):
        def loss(self, loaded: Any, batch: Any) -> LossSum:
            part = super().loss(loaded, batch)
            if self.calls in (5, 6):
                self.named.append(", ".join(batch.sources))
            if self.calls == 5:
                part.total.register_hook(lambda gradient: gradient * math.inf)
            return part

    job = job_in(tmp_path, method=BadGradient({}), loop={"max_steps": 4})
    assert train(job).skipped_steps == 1
    line = next(line for line in said(job).splitlines() if "not applied" in line)
    assert "gradient norm nan" in line or "gradient norm inf" in line
    assert line.endswith("Samples: " + ", ".join(job.method.named))
    assert lines(job)[2]["loss"] is not None
    assert lines(job)[2]["grad_norm"] is None


def without_targets(count: int, source: str = "empty.jsonl") -> list[TokenSample]:
    return [TokenSample(np.arange(5, 15, dtype=np.int32), np.zeros(10, bool), f"{source}:{i}") for i in range(count)]


def test_a_step_without_a_trained_token_divides_by_nothing(tmp_path: Path, job_in) -> None:
    seed = next(s for s in range(999) if sorted(StepPlan(8, 4, 1, 1.0, None, s).step(0)[0]) == [4, 5, 6, 7])
    job = job_in(tmp_path, train_items=[*samples(4), *without_targets(4)], loop={"epochs": 2.0, "seed": seed})
    result = train(job)
    assert (result.steps, result.skipped_steps) == (4, 1)
    first = lines(job)[0]
    assert (first["loss"], first["grad_norm"], first["trained_tokens"]) == (None, 0.0, 0)
    assert "step 1: no token of its samples is trained; nothing is applied. Samples: empty.jsonl:" in said(job)


def test_a_micro_batch_without_a_trained_token_adds_nothing(tmp_path: Path, job_in) -> None:
    rows = [*samples(2), *without_targets(2)]
    job = job_in(tmp_path, train_items=rows, loop={"max_steps": 1})
    assert train(job).skipped_steps == 0
    alone = job_in(tmp_path / "alone", train_items=rows[:2], loop={"max_steps": 1})
    train(alone)
    assert lines(job)[0]["loss"] == pytest.approx(lines(alone)[0]["loss"], rel=1e-5)


def test_18_fp16_overflow_warns_above_5_percent_skipped() -> None:
    """More than 5 % of the steps skipped by the float16 loss scaler."""
    told: list[str] = []
    session: Any = SimpleNamespace(
        state=LoopState(), total_steps=300, progress=SimpleNamespace(say=told.append), job=SimpleNamespace()
    )

    def step(number: int) -> StepResult:
        overflow = number % 10 == 0
        return StepResult(math.inf if overflow else 1.0, 1.0, 8, 4, applied=not overflow, overflow=overflow)

    for number in range(1, 100):
        guards.record(session, step(number))
    assert told == []  # in the first steps the scaler looks for its scale
    for number in range(100, 200):
        guards.record(session, step(number))
    assert len(told) == 1
    assert "float16 loss scaler skipped 10 of 100 steps" in told[0]
    assert session.state.skipped == 0


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path)
    job.loaded.trainable_parameters()[3].data[0, 0] = math.nan
    with pytest.raises(UserError, match="1 of 28 trained tensors hold NaN or infinity"):
        tensors.require_finite(job.loaded, "checkpoint-1")


def test_a_disk_too_small_is_refused_before_the_first_step(
    tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth_factory.run import atomic

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    job = job_in(tmp_path)
    job.folder.data_report.write_text("{}")
    with pytest.raises(UserError, match="Training with 3 checkpoints needs"):
        train(job)
    assert not job.folder.metrics.exists()
    assert not job.folder.data_report.exists()
