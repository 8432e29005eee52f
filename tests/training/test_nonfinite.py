"""NaN and infinity: never applied, never saved."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_jobs import said

from unsloth_factory.config.errors import UserError
from unsloth_factory.training import guards, tensors
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import LossSum, Sft


class Spoilt(Sft):
    """SFT whose loss is spoilt in some micro-batches (numbered from 1)."""

    def __init__(self, bad: Any, factor: float = math.nan) -> None:
        self.bad, self.factor, self.calls = bad, factor, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        return LossSum(part.total * (self.factor if self.calls in self.bad else 1.0), part.count)


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


def test_a_passing_fault_is_survived(tmp_path: Path, job_in) -> None:
    straight = job_in(tmp_path / "straight", loop={"max_steps": 20})
    train(straight)
    # bad are steps 5-14: eighteen micro-batches, because steps 5 and 10 end an epoch and have one
    job = job_in(tmp_path / "run", method=Spoilt(range(9, 27)), loop={"max_steps": 20})
    result = train(job)
    assert "back to" in said(job)
    assert result.rewound
    assert result.skipped_steps == 0  # the counters go back as well
    before, after = lines(straight)[:3], lines(job)[:3]
    assert [line["loss"] for line in after] == [line["loss"] for line in before]
    assert lines(job)[3]["lr"] == lines(straight)[3]["lr"] / 2  # from checkpoint-3 on with half the rate
    assert all(line["loss"] is not None for line in lines(job))
    assert [line["step"] for line in lines(job)] == list(range(1, 21))


def test_nothing_applied_means_nothing_written(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spoilt(range(100)), loop={"max_steps": 3})
    with pytest.raises(UserError, match="None of the 3 steps had a finite loss"):
        train(job)
    assert not job.folder.final_adapter.exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path)
    job.loaded.trainable_parameters()[3].data[0, 0] = math.nan
    with pytest.raises(UserError, match="1 of 28 trained tensors hold NaN or infinity"):
        tensors.require_finite(job.loaded, "checkpoint-1")


def test_a_full_disk_stops_with_the_last_checkpoint(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tensors.save_file
    saves = []

    def fills_up(values: Any, path: Path, **rest: Any) -> None:
        saves.append(path)
        if len(saves) > 3:  # the second checkpoint's second file
            Path(path).write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(values, path, **rest)

    monkeypatch.setattr(tensors, "save_file", fills_up)
    with pytest.raises(UserError, match="Disk full: checkpoint-6 .*checkpoint-3 is intact"):
        train(job_in(tmp_path))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if "-" in path.name) == ["checkpoint-3"]
    job = job_in(tmp_path, run={"resume": "auto"})
    assert train(job).resumed_from == 3


def test_a_disk_too_small_is_refused_before_the_first_step(
    tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth_factory.run import atomic

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: usage)
    job = job_in(tmp_path)
    with pytest.raises(UserError, match="Training with 3 checkpoints needs"):
        train(job)

    assert not job.folder.metrics.exists()
