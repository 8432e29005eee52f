"""Learning rates worked out by hand."""

from __future__ import annotations

import math

import pytest

from unsloth_factory.config.settings import LoopSettings, TuningSettings
from unsloth_factory.training.pacing.schedule import learning_rate, paced_rate, peak_learning_rate


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        # 10 steps, 2 of warm-up: 1/3 and 2/3 of the peak, then progress 0/8 ... 7/8
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 8 / 8, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [1 / 3, 2 / 3, 1, *(0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(1, 8))]),
    ],
)
def test_rates(shape: str, expected: list[float]) -> None:
    rates = [learning_rate(step, 10, peak=2e-4, shape=shape, warmup_ratio=0.2) for step in range(10)]
    assert rates == pytest.approx([2e-4 * factor for factor in expected])


@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.2])
def test_paced_by_equal_steps_it_is_the_same(shape: str, warmup_ratio: float) -> None:
    settings = {"peak": 2e-4, "shape": shape, "warmup_ratio": warmup_ratio}
    for step in range(10):
        assert paced_rate(step / 10, 1 / 10, **settings) == pytest.approx(learning_rate(step, 10, **settings))  # type: ignore[arg-type]


def test_paced_by_unequal_steps() -> None:
    settings = {"peak": 1.0, "shape": "linear", "warmup_ratio": 0.25}
    rates = [paced_rate(progress, 0.05, **settings) for progress in (0.0, 0.2, 0.25, 0.625, 1.0)]  # type: ignore[arg-type]
    assert rates == pytest.approx([0.05 / 0.3, 0.25 / 0.3, 1.0, 0.5, 0.0])


def test_warm_up_rounds_up_and_one_step_is_enough() -> None:
    assert learning_rate(0, 10, peak=1.0, shape="linear", warmup_ratio=0.03) == 0.5
    assert learning_rate(1, 10, peak=1.0, shape="linear", warmup_ratio=0.03) == 1.0
    assert learning_rate(0, 1, peak=1.0, shape="cosine", warmup_ratio=0.0) == 1.0


@pytest.mark.parametrize(
    ("method", "kind", "given", "expected"),
    [
        ("sft", "lora", None, 2e-4),
        ("sft", "full", None, 1e-5),
        ("sft", "freeze", None, 1e-5),
        ("dpo", "lora", None, 5e-6),
        ("dpo", "lora", 1e-3, 1e-3),
    ],
)
def test_peak(method: str, kind: str, given: float | None, expected: float) -> None:
    loop = LoopSettings(learning_rate=given)
    assert peak_learning_rate(loop, TuningSettings(finetuning_type=kind), method) == expected  # type: ignore[arg-type]
