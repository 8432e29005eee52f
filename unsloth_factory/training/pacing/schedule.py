"""Learning rate as a pure function of the step, or of the progress where the time decides how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Callable

from unsloth_factory.config.settings import LoopSettings, TuningSettings

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": lambda progress: 1.0,
}
"""Scheduler type -> factor of the peak rate; progress is 0 at the end of the warm-up and 1 after the last step."""


def learning_rate(step: int, total: int, *, peak: float, shape: str, warmup_ratio: float) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: Index of the step, from 0.
        total: Steps of the whole run.
        peak: Highest learning rate.
        shape: A key of `SHAPES`.
        warmup_ratio: Share of the steps that warm up, rounded up. Warm-up step i of w has the rate peak * i / (w + 1),
            i from 1: no step is wasted at rate 0, and the first step after the warm-up has the peak rate.
    """
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * SHAPES[shape]((step - warmup) / max(1, total - warmup))


def paced_rate(progress: float, share: float, *, peak: float, shape: str, warmup_ratio: float) -> float:
    """Learning rate of a step of a run whose number of steps is not known beforehand.

    With progress i / n and share 1 / n it is `learning_rate(i, n)`, but for the warm-up, which is not rounded to steps.

    Args:
        progress: Share of the run before the step, from 0 to 1.
        share: What the step is expected to add.
        peak: Highest learning rate.
        shape: A key of `SHAPES`.
        warmup_ratio: Share of the run that warms up.
    """
    if progress < warmup_ratio:
        return peak * (progress + share) / (warmup_ratio + share)
    return peak * SHAPES[shape]((progress - warmup_ratio) / (1.0 - warmup_ratio))


def peak_learning_rate(loop: LoopSettings, tuning: TuningSettings, method: str) -> float:
    """The given peak rate, or the default of the method and of what trains."""
    if loop.learning_rate is not None:
        return loop.learning_rate
    if method != "sft":
        return 5e-6
    return 2e-4 if tuning.finetuning_type == "lora" else 1e-5
