"""The best evaluation so far: its checkpoint is kept, the final weights may come from it, and patience ends the run.

The best weights are an ordinary checkpoint-N with its manifest, spared by --save_total_limit. So --resume auto never
takes them by accident (the newest one wins), and a kill at any instant leaves them whole: the one before is deleted
only after its successor is on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.checkpoints.store import damage
from unsloth_factory.training.checkpoints.tensors import read_weights
from unsloth_factory.training.session import Session

PATIENCE = "early stopping"
"""How the reason of an early end begins."""


def judge(session: Session, figures: Mapping[str, float]) -> None:
    """Compare one evaluation with the best one; too many in a row that are no better end the run.

    Args:
        session: Its state is changed.
        figures: The evaluation's, as metrics.jsonl has them.
    """
    state, watch = session.state, session.job.watch
    value = figures.get(f"eval_{watch.metric_for_best}", math.nan)
    # During a bad streak no checkpoint is taken, so that these weights could not be kept; they are those before it.
    if not math.isfinite(value) or state.bad_streak or state.spike_streak:
        return
    gain = math.inf if state.best_value is None else value - state.best_value
    if watch.metric_for_best == "loss" and state.best_value is not None:
        gain = -gain
    if gain > 0 and not (state.forgetting and watch.forgetting == "stop"):
        state.best_metric, state.best_value, state.best_step = watch.metric_for_best, value, state.step
    state.stale_evaluations = 0 if gain > watch.early_stopping_min_delta else state.stale_evaluations + 1
    if _patience_spent(session) and not session.over:
        state.end = (
            f"{PATIENCE}: {watch.metric_for_best} was no better in {state.stale_evaluations} evaluations "
            f"(best {state.best_value:.4f} at step {state.best_step})"
        )


def _patience_spent(session: Session) -> bool:
    patience = session.job.watch.early_stopping_patience
    return patience is not None and session.state.stale_evaluations >= patience


def described(session: Session) -> str:
    """The best evaluation so far, for a printed line."""
    state = session.state
    if state.best_value is None:
        return "no finite figure yet"
    return f"best {state.best_metric} {state.best_value:.4f} at step {state.best_step}"


def kept(session: Session) -> int | None:
    """Step whose checkpoint must not be deleted."""
    return None if session.job.watch.no_keep_best else session.state.best_step


def reconsider(session: Session) -> None:
    """After a checkpoint was restored: other settings, or a best checkpoint that is no longer there."""
    state, watch = session.state, session.job.watch
    if state.end is not None and state.end.startswith(PATIENCE):
        spent = _patience_spent(session)
        way_on = "a larger --early_stopping_patience lets it go on" if spent else "with the new patience it goes on"
        session.progress.say(f"The run had ended ({state.end}); {way_on}")
        state.end = state.end if spent else None
    if state.best_step is None:
        return
    if state.best_metric != watch.metric_for_best:
        reason = f"--metric_for_best changed from {state.best_metric} to {watch.metric_for_best}"
    elif kept(session) is not None and state.best_step not in session.job.store.steps():
        reason = f"checkpoint-{state.best_step}, the best one so far, is no longer there"
    else:
        return
    session.progress.say(f"Warning: {reason}; the best evaluation is looked for anew from here")
    state.best_metric = state.best_value = state.best_step = None
    state.stale_evaluations = 0


def take(session: Session) -> int:
    """Put the weights of the best evaluation into the model where that is asked for; returns their step.

    Raises:
        UserError: Their checkpoint is damaged.
    """
    state, job = session.state, session.job
    if not job.watch.takes_best:
        return state.step
    if state.best_step is None:
        session.progress.say("Warning: no evaluation tells which weights are best; those of the last step are written")
        return state.step
    if state.best_step != state.step:
        path = job.store.path(state.best_step)
        fault = damage(path)
        if fault is not None:
            raise UserError(
                f"{path}, the best evaluation's, is damaged: {fault}. Training is done; repeat the command with "
                "--resume auto --load_best false to take the weights of the last step."
            )
        read_weights(path, job.loaded)
    session.progress.say(f"Final weights: step {state.best_step} of {state.step} ({described(session)})")
    return state.best_step
