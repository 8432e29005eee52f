"""Which samples share a micro-batch. Which samples make an optimizer step never changes; how they are cut may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from unsloth_factory.data.batching import Batch
from unsloth_factory.training import forgetting
from unsloth_factory.training.methods import Method
from unsloth_factory.training.session import Session


def step_batches(session: Session, step: int) -> list[Batch]:
    """This process's micro-batches of one step: a pure function of (seed, step), so there is no loader state."""
    accelerator = session.accelerator
    planned: list[list[Any]] = [[session.job.train_items[i] for i in indices] for indices in session.plan.step(step)]
    planned += [rows for rows in (forgetting.replayed(session, step),) if rows]
    mine = planned[accelerator.process_index :: accelerator.num_processes]
    size = session.micro_batch
    micro = [items[start : start + size] for items in mine for start in range(0, len(items), size)]
    return [_make(session, items, session.job.method) for items in micro]


def eval_batches(session: Session, items: Sequence[Any], method: Method) -> Iterator[Batch]:
    """This process's share of samples whose loss is only measured, one micro-batch at a time."""
    accelerator, size = session.accelerator, session.micro_batch
    for start in range(0, len(items), size)[accelerator.process_index :: accelerator.num_processes]:
        yield _make(session, items[start : start + size], method)


def _make(session: Session, items: Sequence[Any], method: Method) -> Batch:
    return method.make_batch(items, packing=session.packing, pad_id=session.pad_id)
