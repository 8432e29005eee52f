"""What is looked at while the training runs: the held-out samples, by the method's own rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from unsloth_factory.scoring import wilson_interval
from unsloth_factory.training.batches import eval_batches
from unsloth_factory.training.methods import Method
from unsloth_factory.training.reduce import Sums, reduce_number
from unsloth_factory.training.session import Session
from unsloth_factory.training.signals import StopSignals


def look(session: Session, stop: StopSignals) -> dict[str, float]:
    """Evaluate when it is due; remembers the best step."""
    state, job = session.state, session.job
    every = job.run.eval_steps or job.run.save_steps
    if not job.eval_items or (state.step % every and state.step != session.total_steps):
        return {}
    outcome = evaluate(session, job.eval_items, job.method, lambda: stop.received is not None)
    if outcome is None:
        return {}
    loss, metrics = outcome
    state.eval_loss = loss if math.isfinite(loss) else None
    state.eval_metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
    if state.eval_loss is not None and (state.best_eval_loss is None or state.eval_loss < state.best_eval_loss):
        state.best_eval_loss, state.best_step = state.eval_loss, state.step
    figures = {"eval_loss": loss} | {f"eval_{name}": value for name, value in metrics.items()}
    best = (
        f"best loss {state.best_eval_loss:.4f} at step {state.best_step}" if state.best_step else "no finite loss yet"
    )
    shown = "  ".join(_shown(session, name, value) for name, value in figures.items())
    session.progress.say(f"step {state.step}: {shown}  ({best})")
    return figures


def _shown(session: Session, name: str, value: float) -> str:
    """A figure of the evaluation; a share of the held-out pairs with its 95 % interval."""
    if name.removeprefix("eval_") not in session.job.method.shares or not math.isfinite(value):
        return f"{name} {value:.4f}"
    pairs = len(session.job.eval_items)
    low, high = wilson_interval(round(value * pairs), pairs)
    return f"{name} {value:.2f} [{low:.2f}, {high:.2f}]"


def evaluate(
    session: Session, items: Sequence[Any], method: Method, stop: Callable[[], bool]
) -> tuple[float, dict[str, float]] | None:
    """Loss and figures of a method on samples that are not trained on; None when `stop` asked to leave early."""
    loaded = session.job.loaded
    sums, count = Sums(session, method.figures), 0
    loaded.model.eval()
    try:
        with torch.no_grad():
            for batch in eval_batches(session, items, method):
                if stop():
                    return None
                with session.accelerator.autocast():
                    part = method.loss(loaded, batch)
                sums.add(part)
                count += part.count
    finally:
        loaded.model.train()
    loss, metrics = sums.means(int(reduce_number(session, count)))
    return loss.item(), metrics
