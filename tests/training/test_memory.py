"""Out of GPU memory: the same step again in smaller pieces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from training_jobs import said

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import LossSum, Sft


class SmallCard(Sft):
    """Runs out of memory, from its n-th micro-batch on, with more than some samples."""

    def __init__(self, most: int, start: int = 0) -> None:
        self.most, self.start, self.calls = most, start, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        if self.calls > self.start and len(batch.sources) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_step_is_repeated_with_smaller_micro_batches(tmp_path: Path, job_in) -> None:
    loop = {"batch_size": 4, "accumulation_steps": 2}
    train(job_in(tmp_path / "large", loop=loop))
    # the fault comes in the second micro-batch of step 2, when the first has left its gradients behind
    job = job_in(tmp_path / "small", loop=loop, method=SmallCard(1, start=3))
    train(job)
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    text = said(job)
    assert "out of GPU memory in step 2 with 4 samples in a micro-batch; the step is repeated with 2" in text
    assert "out of GPU memory in step 2 with 2 samples in a micro-batch; the step is repeated with 1" in text
    assert text.count("out of GPU memory") == 2


def test_one_sample_that_does_not_fit(tmp_path: Path, job_in) -> None:
    with pytest.raises(UserError, match="Out of GPU memory in step 1 with one sample.*--max_seq_length"):
        train(job_in(tmp_path, method=SmallCard(0)))
