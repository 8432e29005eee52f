"""Is one training the same as another? Told by how far trainings differ that must be the same but for rounding."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenSample, Turn

HANDBOOK = Path(__file__).resolve().parents[2] / "unsloth_factory" / "assets" / "demo" / "handbook_train.jsonl"
MOST = 2.5
"""Times the noise, which is too small by some: trainings that cut micro-batches in other ways still round alike within
a row. In bfloat16 on a CPU the fast engine came to 1.5 (all steps) and 2.0 (last quarter), `standard` with a learning
rate 2 % higher to 3.4 and 4.2, so that is seen; one matrix of 28 scaled 5 % wrong came to 0.9, so that is not: the
tests of the gradients see it."""


def handbook(template: ChatTemplate) -> list[TokenSample]:
    """Questions and answers of the demo, which the bundled model can learn."""
    rows = [json.loads(line) for line in HANDBOOK.read_text(encoding="utf-8").splitlines()]
    found: list[TokenSample] = []
    for number, row in enumerate(rows):
        turns = (Turn("user", row["instruction"]), Turn("assistant", row["output"]))
        found += template.encode_conversation(Conversation(turns, f"handbook:{number}"))
    return found


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """Root mean square of the relative difference of two curves of positive losses."""
    return math.sqrt(math.fsum(math.log(x / y) ** 2 for x, y in zip(a, b, strict=True)) / len(a))


def against_noise(
    curve: Sequence[float], reference: Sequence[float], others: Sequence[Sequence[float]]
) -> dict[str, float]:
    """How far a curve is from the reference, in units of how far from it trainings are that differ in rounding alone.

    Args:
        curve: Loss of each step.
        reference: Of the same steps.
        others: The reference's training again, its micro-batches cut in other ways.

    Returns:
        `all` steps, and the `last` quarter, where differences have grown; both must be below `MOST`. `noise` is the
        relative difference that 1 stands for, over all steps. 200 steps must also have taught something, or all curves
        would be alike: `learned` is the last quarter's mean loss as a share of the first ten steps'.
    """
    tail = len(reference) * 3 // 4
    noise = max(distance(other, reference) for other in others)
    late = max(distance(other[tail:], reference[tail:]) for other in others)
    return {
        "all": distance(curve, reference) / noise,
        "last": distance(curve[tail:], reference[tail:]) / late,
        "noise": noise,
        "learned": math.fsum(reference[tail:]) / len(reference[tail:]) / (math.fsum(reference[:10]) / 10),
    }
