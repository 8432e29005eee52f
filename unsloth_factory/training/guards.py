"""Numbers stay sane: a step that is not finite is never applied and never saved, and its samples are named."""

from __future__ import annotations

from collections.abc import Callable

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.checkpoint import Checkpoint
from unsloth_factory.training.session import Session
from unsloth_factory.training.step import StepResult

MAX_BAD_STREAK = 10
"""Steps in a row that may be NaN or infinite before the run is set back, and the second time stopped."""


def record(session: Session, result: StepResult) -> None:
    """Count the step, and name the samples of one that was not applied."""
    state = session.state
    state.step += 1
    state.tokens += result.tokens
    if result.finite:
        state.applied += 1
        state.bad_streak = 0
        state.trained_tokens += result.trained_tokens
        state.last_loss = result.loss
    elif result.overflow:
        state.scaler_skips += 1
    else:
        state.skipped += 1
        state.bad_streak += 1
        session.progress.say(
            f"Warning: step {state.step}: loss {result.loss}, gradient norm {result.gradient_norm}; the step is not "
            f"applied ({state.bad_streak} in a row). Samples: {_some(result.sources)}"
        )


def sound(session: Session) -> bool:
    """The last step was applied, so that a checkpoint of it may be gone back to."""
    return session.state.bad_streak == 0 and session.state.spike_streak == 0


def lost(session: Session) -> bool:
    """Too many steps in a row were not finite."""
    return session.state.bad_streak >= MAX_BAD_STREAK


def rewind(session: Session, result: StepResult, restore: Callable[[Session, Checkpoint], None]) -> None:
    """After `MAX_BAD_STREAK` bad steps: once, back to the last checkpoint; then no further.

    Raises:
        UserError: The run was set back before, or there is nothing to go back to.
    """
    state = session.state
    checkpoint = None if state.rewound else session.job.store.newest_intact()
    if checkpoint is None:
        raise UserError(
            f"{state.bad_streak} steps in a row up to step {state.step} had a loss or gradient that is NaN or "
            f"infinite{', again after going back to the last checkpoint' if state.rewound else ''}. None of them was "
            f"applied or saved. Last samples: {_some(result.sources)}. Try a lower --learning_rate (now "
            f"{session.peak_rate:g}), look at those samples, or drop --dtype float16 on a GPU with bf16."
        )
    restore(session, checkpoint)
    state.rewound = True
    session.progress.rewind(state.step)
    session.progress.say(f"Warning: {MAX_BAD_STREAK} bad steps in a row; back to {checkpoint.path}, once")


def _some(sources: list[str], most: int = 8) -> str:
    more = f" and {len(sources) - most} more" if len(sources) > most else ""
    return ", ".join(sources[:most]) + more
