"""Loss and figures of samples that are not trained on. Too little memory never ends the training here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from unsloth_factory.training.batches import eval_groups, make, pieces
from unsloth_factory.training.memory.cuts import memory_tokens, row_lengths
from unsloth_factory.training.memory.shortage import Shortage, attempt, insist
from unsloth_factory.training.methods import Method
from unsloth_factory.training.reduce import Sums, reduce_number
from unsloth_factory.training.session import Session


def evaluate(
    session: Session, items: Sequence[Any], method: Method, leave: Callable[[], bool]
) -> tuple[float, dict[str, float]] | None:
    """Loss and figures of a method on samples, by its own rule; None when `leave` asked to end early.

    A micro-batch that does not fit is cut in half, and so are those after it; a sample that does not fit alone is named
    and left out. All values are NaN when nothing could be measured.
    """
    loaded = session.job.loaded
    loaded.model.eval()
    try:
        with torch.no_grad():
            return _evaluate(session, items, method, leave)
    finally:
        loaded.model.train()


def _evaluate(
    session: Session, items: Sequence[Any], method: Method, leave: Callable[[], bool]
) -> tuple[float, dict[str, float]] | None:
    release = session.meter.release
    sums = insist(partial(Sums, session, method.figures), release)
    count, left_out = 0, 0
    for group in eval_groups(session, items):
        if leave():
            return None
        counted, lacking = add_group(session, group, method, sums)
        count, left_out = count + counted, left_out + lacking
    if left_out:
        session.progress.say(f"The evaluation loss leaves out {left_out} of {len(items)} samples")
    total = int(reduce_number(session, count))
    means = attempt(partial(_means, sums, total), release) if total else Shortage("nothing fits")
    if isinstance(means, Shortage):
        session.progress.say(f"Warning: no evaluation loss this time: out of {session.meter.name} ({means.message})")
        return math.nan, dict.fromkeys(method.figures, math.nan)
    return means


def add_group(session: Session, group: Sequence[Any], method: Method, sums: Sums) -> tuple[int, int]:
    """Add the samples of one micro-batch to the sums, in smaller pieces where they do not fit.

    Returns:
        (units added, samples left out).
    """
    levers = session.state.levers
    pending = pieces(session, group, levers.eval_tokens)
    count = left_out = 0
    while pending:
        piece = pending.pop(0)
        added = attempt(partial(_add, session, piece, method, sums), session.meter.release)
        if not isinstance(added, Shortage):
            count += added
            continue
        tokens = memory_tokens([row_lengths(item) for item in piece], session.packing)
        what = f"Warning: out of {session.meter.name} in the evaluation"
        if len(piece) > 1:
            levers.eval_tokens = tokens // 2
            pending = pieces(session, piece, levers.eval_tokens) + pending
            session.progress.say(
                f"{what} with {len(piece)} samples of {tokens:,} tokens; it goes on with at most {tokens // 2:,} "
                "tokens at a time"
            )
        else:
            left_out += 1
            source = make(session, piece, method).sources[0]
            session.progress.say(f"{what} with one sample of {tokens:,} tokens, {source}; it is left out")
    return count, left_out


def _add(session: Session, items: Sequence[Any], method: Method, sums: Sums) -> int:
    with session.accelerator.autocast():
        part = method.loss(session.job.loaded, make(session, items, method))
    sums.add(part)  # the addition itself comes last in there and needs no memory: a sample is never added twice
    return part.count


def _means(sums: Sums, count: int) -> tuple[float, dict[str, float]]:
    loss, metrics = sums.means(count)
    return loss.item(), metrics
