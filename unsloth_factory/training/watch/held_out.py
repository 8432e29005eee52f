"""What is looked at while the training runs: held-out loss, general loss, generated answers. No weight changes here."""

from __future__ import annotations

import math
from collections.abc import Callable

from unsloth_factory.scoring import wilson_interval
from unsloth_factory.training.methods import Sft
from unsloth_factory.training.session import Session
from unsloth_factory.training.signals import StopRequest
from unsloth_factory.training.watch import best, forgetting, generations
from unsloth_factory.training.watch.evaluation import evaluate


def before(session: Session, stop: StopRequest) -> bool:
    """Look at the untrained model, for comparison later; False when a signal came in between."""
    leave = _leave(session, stop)
    general = _general_loss(session, leave)
    answers = generations.ask(session, leave) if general is not None else None
    if general is None or answers is None:
        return False
    if session.job.general_items:
        forgetting.note_start(session, general)
    generations.keep(session, answers)
    return True


def watches(session: Session) -> bool:
    """There is something to look at."""
    return bool(session.job.eval_items) or forgetting.acts(session)


def look(session: Session, stop: StopRequest) -> dict[str, float] | None:
    """Everything that is watched, as figures for the step's line of metrics.jsonl.

    None when a signal came in between: then nothing is remembered, and the resumed run looks again.
    """
    state, job = session.state, session.job
    ended_before, forgot_before = state.end is not None, state.forgetting
    leave = _leave(session, stop)
    held_out = evaluate(session, job.eval_items, job.method, leave) if job.eval_items else (math.nan, {})
    general = _general_loss(session, leave) if held_out is not None else None
    answers = generations.ask(session, leave) if general is not None else None
    if held_out is None or general is None or answers is None:
        return None
    figures = _remember(session, *held_out) | forgetting.judge(session, general)
    figures |= generations.figures(answers)
    best.judge(session, figures)
    generations.keep(session, answers)
    session.progress.say(f"step {state.step}: {_summary(session, figures)}")
    generations.show(session, answers)
    if state.forgetting and not forgot_before:
        forgetting.act(session)
    if state.end is not None and not ended_before:
        session.progress.say(f"The run ends at step {state.step} of {session.total_steps}: {state.end}")
    return figures


def _leave(session: Session, stop: StopRequest) -> Callable[[], bool]:
    """Asked between two batches: has a signal come, so that the rest waits for the resumed run?

    Several processes finish what they have begun: they would not hear of it at the same batch.
    """
    return lambda: stop.received is not None and session.accelerator.num_processes == 1


def _remember(session: Session, loss: float, metrics: dict[str, float]) -> dict[str, float]:
    """Note the held-out figures in the state; returns them under their names in metrics.jsonl."""
    state = session.state
    if not session.job.eval_items:
        return {}
    state.eval_loss = loss if math.isfinite(loss) else None
    state.eval_metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if state.eval_loss is not None:
        state.best_eval_loss = min(state.eval_loss, state.best_eval_loss or math.inf)
    return {"eval_loss": loss} | {f"eval_{name}": value for name, value in metrics.items()}


def _summary(session: Session, figures: dict[str, float]) -> str:
    """One line: each figure, a share with its 95 % interval, and the best evaluation so far."""
    shown = [
        _shown(session, name, figures)
        for name in figures
        if not name.endswith(("_low", "_high")) and not _goes_without_saying(name, figures[name])
    ]
    return "  ".join(shown) + (f"  ({best.described(session)})" if session.job.eval_items else "")


def _goes_without_saying(name: str, value: float) -> bool:
    return name == "general_loss_start" or (name == "eval_stopped_by_itself" and value == 1.0)


def _shown(session: Session, name: str, figures: dict[str, float]) -> str:
    value, pairs = figures[name], len(session.job.eval_items)
    if name == "general_loss" and "general_loss_start" in figures:
        return f"{name} {value:.4f} ({value - figures['general_loss_start']:+.4f})"
    if f"{name}_low" in figures:
        return f"{name} {value:.2f} [{figures[f'{name}_low']:.2f}, {figures[f'{name}_high']:.2f}]"
    if name.removeprefix("eval_") in session.job.method.shares and math.isfinite(value):
        low, high = wilson_interval(round(value * pairs), pairs)
        return f"{name} {value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{name} {value:.4f}"


def _general_loss(session: Session, leave: Callable[[], bool]) -> float | None:
    """SFT loss of the general questions per token, NaN where there are none; None when `leave` said so."""
    if not forgetting.measures(session):
        return math.nan
    outcome = evaluate(session, session.job.general_items, Sft(), leave)
    return None if outcome is None else outcome[0]
