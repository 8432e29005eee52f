"""Which samples share a micro-batch. Which samples make an optimizer step never changes; how they are cut may."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from unsloth_factory.data.batching import Batch
from unsloth_factory.model.fast import pace
from unsloth_factory.training.memory.cuts import cut, merged, row_lengths
from unsloth_factory.training.methods import Method
from unsloth_factory.training.session import Session
from unsloth_factory.training.watch import forgetting


def planned(session: Session, step: int, roughly: bool = False) -> list[Sequence[Any]]:
    """This process's micro-batches of one step, before memory cuts them smaller.

    Args:
        session: Of the run.
        step: Index from 0.
        roughly: As few as fit; which of them are quickest (1 ms a step) is not asked.
    """
    accelerator, items, size = session.accelerator, session.job.train_items, session.job.loop.batch_size
    groups: list[list[Any]] = [[items[i] for i in indices] for indices in session.plan.step(step)]
    groups += [rows for rows in (forgetting.replayed(session, step),) if rows]
    mine = groups[accelerator.process_index :: accelerator.num_processes]
    budget = session.state.merged_tokens
    if budget is not None and session.packing:
        costs = [] if roughly else session.state.micro_batch_costs
        known = partial(pace.cost, costs) if costs else None
        return merged([item for group in mine for item in group], row_lengths, budget, known)
    return [group[start : start + size] for group in mine for start in range(0, len(group), size)]


def step_batches(session: Session, step: int) -> list[Batch]:
    """This process's micro-batches of one step: a pure function of (seed, step) and of what checkpoints keep."""
    if session.ahead is not None and session.ahead[0] == _asked(session, step):
        return session.ahead[1]
    limit = session.state.levers.micro_batch_tokens
    smaller = [piece for group in planned(session, step) for piece in pieces(session, group, limit)]
    return [make(session, piece, session.job.method) for piece in smaller]


def look_ahead(session: Session, step: int) -> None:
    """Make the micro-batches of a later step now, while the GPU is busy, so that it need not wait for them then."""
    if step < session.total_steps:
        session.ahead = None
        session.ahead = (_asked(session, step), step_batches(session, step))
        with suppress(RuntimeError):  # for want of memory: what cannot be done now is done, and handled, in its step
            for first in session.ahead[1][:1]:
                session.job.loaded.expect(first.input_ids)


def _asked(session: Session, step: int) -> tuple[int | None, ...]:
    """All that the micro-batches of a step depend on and that may change from one step to the next."""
    state = session.state
    return step, state.levers.micro_batch_tokens, state.merged_tokens, state.replay_from


def eval_groups(session: Session, items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """This process's share of samples whose loss is only measured, as many together as in training."""
    accelerator, size = session.accelerator, session.job.loop.batch_size
    for start in range(0, len(items), size)[accelerator.process_index :: accelerator.num_processes]:
        yield items[start : start + size]


def pieces(session: Session, group: Sequence[Any], limit: int | None) -> list[Sequence[Any]]:
    """The samples of one micro-batch, cut so that no piece of several holds more tokens than the limit."""
    return cut(group, row_lengths, limit=limit, packing=session.packing)


def make(session: Session, items: Sequence[Any], method: Method) -> Batch:
    """Token rows of some samples."""
    return method.make_batch(items, packing=session.packing, pad_id=session.pad_id)
