"""Micro-batches that were made ahead of their step are those that the step itself would make."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from training_jobs import samples

from unsloth_factory.model.fast.planner import STEP
from unsloth_factory.training.batches import look_ahead, planned, step_batches
from unsloth_factory.training.reporting.progress import Progress
from unsloth_factory.training.session import Session, open_session


def opened(tmp_path: Path, job_in: Any) -> Session:
    job = job_in(tmp_path, train_items=samples(24), loop={"batch_size": 4, "accumulation_steps": 2})
    return open_session(job, Progress(Console(file=io.StringIO()), 1))


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other, strict=False))
    return len(one) == len(other) and all(torch.equal(a.input_ids, b.input_ids) for a, b in pairs)


def test_the_same_micro_batches(tmp_path: Path, job_in: Any) -> None:
    session = opened(tmp_path, job_in)
    made = step_batches(session, 1)
    look_ahead(session, 1)
    assert session.ahead is not None
    assert same(step_batches(session, 1), made)
    assert step_batches(session, 1) is session.ahead[1]
    assert not same(step_batches(session, 0), made)


def test_what_has_changed_since_counts(tmp_path: Path, job_in: Any) -> None:
    session = opened(tmp_path, job_in)
    look_ahead(session, 1)
    whole = step_batches(session, 1)
    session.state.levers.micro_batch_tokens = max(batch.input_ids.numel() for batch in whole) // 2
    assert len(step_batches(session, 1)) > len(whole)


def test_what_sizes_take_decides_how_samples_are_put_together(tmp_path: Path, job_in: Any) -> None:
    session = opened(tmp_path, job_in)
    whole = sum(batch.tokens for batch in step_batches(session, 1))
    session.state.merged_tokens = 2 * STEP
    cheap = step_batches(session, 1)
    session.state.micro_batch_costs = [1.0, 9.0]  # a second tile is dear
    dear = step_batches(session, 1)
    assert len(dear) > len(cheap)
    assert {whole} == {sum(batch.tokens for batch in batches) for batches in (cheap, dear)}
    assert planned(session, 1, roughly=True) != planned(session, 1)


def test_nothing_beyond_the_end(tmp_path: Path, job_in: Any) -> None:
    session = opened(tmp_path, job_in)
    look_ahead(session, session.total_steps)
    assert session.ahead is None
