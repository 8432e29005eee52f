"""Numbers stay sane: a step that is not finite is never applied and never saved, and its samples are named."""

from __future__ import annotations

from collections.abc import Callable

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.checkpoints.store import Checkpoint
from unsloth_factory.training.session import Session
from unsloth_factory.training.step import StepResult
from unsloth_factory.training.watch import anomalies

SCALER_SKIPS = 0.05
"""Share of the steps that the fp16 loss scaler may skip without a word; it finds its scale in the first few."""
SCALER_STEPS = 100
SLOWER = 0.5
"""Factor of the learning rate when the run is set back."""


def record(session: Session, result: StepResult) -> None:
    """Count the step, and name the samples of one that was not sound."""
    state = session.state
    state.step += 1
    state.tokens += result.tokens
    state.spikes += result.spike
    if result.applied:
        _applied(session, result)
    elif result.units == 0:
        state.skipped += 1
        session.progress.say(
            f"Warning: step {state.step}: no token of its samples is trained; nothing is applied. "
            f"Samples: {_some(result.suspects)}"
        )
    elif result.overflow:
        state.scaler_skips += 1
    elif result.spike:
        state.spike_streak += 1
        _say_spike(session, result, f"the step is not applied ({state.spike_streak} in a row)")
    else:
        state.skipped += 1
        state.bad_streak += 1
        session.progress.say(
            f"Warning: step {state.step}: loss {result.loss}, gradient norm {result.gradient_norm}; the step is not "
            f"applied ({state.bad_streak} in a row). Samples: {_some(result.suspects)}"
        )
    _watch_scaler(session)


def _applied(session: Session, result: StepResult) -> None:
    state = session.state
    state.applied += 1
    state.bad_streak = 0
    state.trained_tokens += result.trained_tokens
    state.last_loss = result.loss
    if result.spike:
        _say_spike(session, result, "the step is applied")
    if state.spike_streak:
        if result.spike:  # no passing spike: this is how high the loss is now
            state.recent_losses, state.recent_norms = [], []
        state.spike_streak = 0
    anomalies.remember(state, result.loss, result.gradient_norm)


def _say_spike(session: Session, result: StepResult, what: str) -> None:
    state = session.state
    session.progress.say(
        f"Warning: step {state.step}: loss {result.loss:.4g}, gradient norm {result.gradient_norm:.4g}, far above the "
        f"steps before it (at most {max(state.recent_losses):.4g} and {max(state.recent_norms):.4g} lately); {what}. "
        f"Samples: {_some(result.suspects)}"
    )


def _watch_scaler(session: Session) -> None:
    state = session.state
    if state.scaler_warned or state.step < min(SCALER_STEPS, session.total_steps):
        return
    if state.scaler_skips > SCALER_SKIPS * state.step:
        state.scaler_warned = True
        session.progress.say(
            f"Warning: the float16 loss scaler skipped {state.scaler_skips} of {state.step} steps: gradients overflow "
            "float16. A lower --learning_rate or shorter samples help; a GPU with bfloat16 has no such limit."
        )


def sound(session: Session) -> bool:
    """The last step was applied, so that a checkpoint of it may be gone back to."""
    return session.state.bad_streak == 0 and session.state.spike_streak == 0


def lost(session: Session) -> bool:
    """Too many steps in a row were not finite, or were spikes."""
    return session.state.bad_streak >= session.job.guard.max_bad_steps or _spiking(session)


def _spiking(session: Session) -> bool:
    state = session.state
    rewinds = session.job.guard.loss_spike == "rewind" and not state.rewound
    return rewinds and state.spike_streak >= anomalies.STREAK and bool(session.job.store.steps())


def rewind(session: Session, result: StepResult, restore: Callable[[Session, Checkpoint], None]) -> None:
    """After too many bad steps: once, back to the last checkpoint with half the learning rate; then no further.

    Raises:
        UserError: The run was set back before, may not be, or has nothing intact to go back to.
    """
    state = session.state
    spiking = _spiking(session)
    allowed = spiking or (session.job.guard.on_bad_steps == "rewind" and not state.rewound)
    checkpoint = session.job.store.newest_intact() if allowed else None
    if checkpoint is None:
        what = f"{state.spike_streak} steps" if spiking else f"{state.bad_streak} steps"
        had = "were far above the ones before" if spiking else "had a loss or gradient that is NaN or infinite"
        raise UserError(
            f"{what} in a row up to step {state.step} {had}"
            f"{', again after going back to the last checkpoint' if state.rewound else ''}. None of them was "
            f"applied or saved. Last samples: {_some(result.suspects)}. Look at those samples, or start "
            f"anew with --overwrite and a lower --learning_rate (now {session.rate(state.step - 1):.3g})."
        )
    what = f"{state.spike_streak} spikes" if spiking else f"{state.bad_streak} bad steps"
    restore(session, checkpoint)
    state.rewound = True
    state.rate_factor *= SLOWER
    session.progress.rewind(state.step)
    session.progress.say(
        f"Warning: {what} in a row; back to {checkpoint.path}, once, and on with {state.rate_factor:g} times the "
        "learning rate"
    )


def _some(sources: list[str], most: int = 8) -> str:
    more = f" and {len(sources) - most} more" if len(sources) > most else ""
    return ", ".join(sources[:most]) + more
