"""Forgetting: does the loss on general questions rise while the domain's falls? Warn, stop, or mix general rows in.

Measured is the SFT loss per token of general answers, whatever the method; judged is its rise over the loss before the
first step, in nats. Nats and not a ratio: exp(-rise) is by how much each right token has become less likely, which
means the same for a strong model (general loss 0.8) and for a weak one (3.0), while a share of 0.8 is noise soon.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import TokenSample
from unsloth_factory.training.checkpoints.resume import data_hash
from unsloth_factory.training.session import Session

REASON = "forgetting"
"""How the reason of an early end begins."""
UNKNOWN = 0.5
"""General loss as a share of that of guessing any token, from which on there is nothing to forget. Models that can
talk have a tenth of it."""
REPLAY_STREAM = 0x9E7A
"""Tells the random numbers of replay from those of the sample order."""


def acts(session: Session) -> bool:
    """The guard may do more than warn, so it must look even where nothing is held out."""
    return measures(session) and session.job.watch.forgetting in ("stop", "replay")


def measures(session: Session) -> bool:
    """There is something that could be forgotten."""
    return bool(session.job.general_items) and not _unknown(session)


def note_start(session: Session, loss: float) -> None:
    """Remember the loss before the first step."""
    state = session.state
    state.general_start = state.general_loss = loss if math.isfinite(loss) else None
    note = ""
    if _unknown(session):
        note = ": the model does not know such questions, so there is nothing to forget, and it is not measured again"
    session.progress.say(f"Before training: general loss {loss:.4f} on {len(session.job.general_items)} answers{note}")


def judge(session: Session, loss: float) -> dict[str, float]:
    """Take in a new general loss, before `act`; returns its figures for metrics.jsonl."""
    state = session.state
    if not measures(session):
        return {}
    if state.general_start is None:  # a run that was begun without this guard: from here on, then
        note_start(session, loss)
    if state.general_start is None or not math.isfinite(loss):
        return {"general_loss": loss}
    state.general_loss = loss
    state.forgetting = _past_limit(session)
    return {"general_loss": loss, "general_loss_start": state.general_start}


def _rise(session: Session) -> float:
    return (session.state.general_loss or 0.0) - (session.state.general_start or 0.0)


def _past_limit(session: Session) -> bool:
    return _rise(session) > session.job.watch.forgetting_limit


def _unknown(session: Session) -> bool:
    """The model had hardly learnt these languages before: the bundled one starts at 10.7 nats, guessing gives 8.5."""
    guessing = math.log(len(session.job.loaded.tokenizer))
    return (session.state.general_start or 0.0) > UNKNOWN * guessing


def act(session: Session) -> None:
    """Do what --forgetting says; called when the limit has just been passed."""
    state, watch = session.state, session.job.watch
    rose = (
        f"{REASON}: the loss on general questions rose by {_rise(session):.3f} to {state.general_loss:.3f} nats a "
        f"token (limit {watch.forgetting_limit:g})"
    )
    if watch.forgetting == "stop" and not session.over:
        state.end = rose
    elif watch.forgetting == "replay" and state.replay_from is None:
        state.replay_from, state.replay_data = state.step, data_hash(session.job.replay_items)
        session.progress.say(f"Warning: {rose}; from here on {watch.replay_samples} general rows are in each step")
    else:
        share = 1 - math.exp(-_rise(session))
        session.progress.say(
            f"Warning: {rose}: each right token there is now {100 * share:.0f} % less likely. "
            "Fewer --epochs, a lower --learning_rate, or --forgetting replay keep more of it."
        )


def replayed(session: Session, step: int) -> list[TokenSample]:
    """General rows of one optimizer step (index from 0): a pure function of the seed, the step and `replay_from`."""
    state, watch, rows = session.state, session.job.watch, session.job.replay_items
    if watch.forgetting != "replay" or state.replay_from is None or step < state.replay_from or not rows:
        return []
    seeds = np.random.SeedSequence([session.job.loop.seed % 2**64, REPLAY_STREAM, step])
    chosen = np.random.Generator(np.random.PCG64(seeds)).permutation(len(rows))[: watch.replay_samples]
    return [rows[index] for index in sorted(chosen.tolist())]


def reconsider(session: Session) -> None:
    """After a checkpoint was restored: other settings or other general rows.

    Raises:
        UserError: Replay had begun, with other rows.
    """
    state, watch = session.state, session.job.watch
    if state.end is not None and state.end.startswith(REASON):
        still = watch.forgetting == "stop" and _past_limit(session)
        way_on = "--forgetting warn lets it go on" if still else "with the new --forgetting it goes on"
        session.progress.say(f"The run had ended ({state.end}); {way_on}")
        state.end, state.forgetting = (state.end, True) if still else (None, False)
    if state.replay_from is None:
        # Past the limit and nothing done yet: --forgetting was warn. The next evaluation shall act.
        state.forgetting = state.forgetting and (state.end is not None or watch.forgetting == "warn")
        return
    if watch.forgetting != "replay":
        session.progress.say(
            f"--forgetting changed from replay to {watch.forgetting}: no more general rows are mixed in"
        )
    elif data_hash(session.job.replay_items) != state.replay_data:
        raise UserError(
            f"Replay of general rows began at step {state.replay_from + 1} with other rows. Give the --general_dataset "
            "of then, --forgetting warn to go on without replay, or start anew with --overwrite."
        )


def split_general(samples: Sequence[TokenSample], most: int = 64) -> tuple[list[TokenSample], list[TokenSample]]:
    """(rows to measure, rows to replay), alternating, so that both hold every kind of row; none is in both.

    Args:
        samples: General rows, in the order of their file.
        most: Rows to measure at most, spread over the file: a measurement must stay cheap.
    """
    measured, replay = samples[::2], samples[1::2]
    stride = -(-len(measured) // most) if measured else 1
    return list(measured[::stride]), list(replay)
