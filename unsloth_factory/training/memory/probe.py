"""Before step 1: everything that a step needs is allocated or tried, and nothing is changed by it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from unsloth_factory.data.batching import Batch
from unsloth_factory.training.batches import eval_groups, make, pieces, planned
from unsloth_factory.training.memory import relief
from unsloth_factory.training.memory.cuts import memory_tokens, row_lengths
from unsloth_factory.training.memory.shortage import Shortage, attempt
from unsloth_factory.training.optimizers import allocate_state
from unsloth_factory.training.reduce import Sums
from unsloth_factory.training.reporting.progress import print_labelled
from unsloth_factory.training.session import Session
from unsloth_factory.training.step import add_gradients, start_over
from unsloth_factory.training.watch.evaluation import add_group

MOST_STEPS = 100_000
"""Steps whose lengths are looked at: two seconds."""


def probe(session: Session) -> None:
    """Allocate the optimizer's state; then try the longest micro-batches of the run, where that is worth it.

    Weights, optimizer, counters and random numbers are afterwards what they were, bit for bit. Levers are pulled until
    it fits.

    Raises:
        UserError: It does not fit whatever is given up.
    """
    optimizer, meter = session.optimizer.optimizer, session.meter
    outcome = attempt(partial(allocate_state, optimizer), meter.release)
    if isinstance(outcome, Shortage):
        outcome = attempt(partial(allocate_state, optimizer), meter.release)
    if isinstance(outcome, Shortage):
        raise relief.nothing_for_the_update(session, outcome.message)
    session.state.levers.apply(session.job.loaded)
    session.state.merged_tokens = session.state.merged_tokens or session.job.loaded.token_budget
    session.state.micro_batch_costs = session.state.micro_batch_costs or _costs(session)
    if not meter.probes or session.over:
        return
    devices = [session.job.loaded.device] if session.job.loaded.device.type == "cuda" else []
    scaler = session.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    with torch.random.fork_rng(devices=devices):
        tokens = _probe_training(session)
        budget = session.job.loaded.token_budget
        if session.state.merged_tokens is not None and budget is not None:
            # what did not fit has left less room to plan with
            session.state.merged_tokens = min(session.state.merged_tokens, budget)
        reading = meter.read()
        _probe_evaluation(session)
    if scaler is not None:
        scaler.load_state_dict(scale)
    notes = [f"Memory      longest micro-batch of {tokens:,} tokens: peak {reading}"]
    if session.state.merged_tokens is not None and session.packing:
        notes.append(f"samples share micro-batches of up to {session.state.merged_tokens:,} tokens")
    notes += [str(session.state.levers)] if str(session.state.levers) else []
    print_labelled(session.progress.console, "; ".join(notes))


def _costs(session: Session) -> list[float]:
    """What micro-batches take by their tokens; none where samples are not put together, or memory is short already."""
    if session.state.merged_tokens is None or not session.packing:
        return []
    measure = partial(session.job.loaded.micro_batch_costs, session.state.merged_tokens)
    outcome = attempt(measure, session.meter.release)
    return [] if isinstance(outcome, Shortage) else outcome


def _probe_training(session: Session) -> int:
    """Forward and backward pass of the longest micro-batch until one fits; its tokens."""
    session.job.loaded.model.train()
    while True:
        batch = make(session, longest_micro_batch(session), session.job.method)
        session.meter.reset_peak()
        outcome = attempt(partial(_try, session, batch), session.meter.release)
        start_over(session)
        if not isinstance(outcome, Shortage):
            return batch.input_ids.numel()
        session.meter.release()
        relief.relieve(session, batch, f"before step {session.state.step + 1}")


def _try(session: Session, batch: Batch) -> None:
    if session.job.loop.accumulation_steps > 1 or session.state.levers.micro_batch_tokens is not None:
        session.job.loaded.allocate_gradients()  # as a micro-batch before this one would have left them
    sums = Sums(session, session.job.method.figures)
    add_gradients(session, batch, max(1, session.job.method.count(batch)), sums)
    sums.means(1)


def _probe_evaluation(session: Session) -> None:
    """Forward pass of the longest evaluation micro-batch; what does not fit there is cut or named."""
    method = session.job.method
    groups: list[Any] = list(eval_groups(session, session.job.eval_items))
    if not groups:
        return
    longest = max(groups, key=lambda group: _tokens(session, group))
    session.job.loaded.model.eval()
    with torch.no_grad():
        add_group(session, longest, method, Sums(session, method.figures))
    session.job.loaded.model.train()


def longest_micro_batch(session: Session) -> Sequence[Any]:
    """The samples of the micro-batch that holds the most tokens, of all that are still to come.

    Only lengths are looked at: 100,000 samples x 3 epochs take under a second. Of a run that --time_budget will end
    there may be millions of steps: the first `MOST_STEPS` are looked at.
    """
    limit, most, found = session.state.levers.micro_batch_tokens, 0, session.job.train_items[:1]
    for step in range(session.state.step, min(session.total_steps, session.state.step + MOST_STEPS)):
        for group in planned(session, step, roughly=True):
            if _tokens(session, group) <= most:
                continue  # cutting does not make it longer
            for piece in pieces(session, group, limit):
                if _tokens(session, piece) > most:
                    most, found = _tokens(session, piece), piece
    return found


def _tokens(session: Session, samples: Sequence[Any]) -> int:
    return memory_tokens([row_lengths(item) for item in samples], session.packing)
