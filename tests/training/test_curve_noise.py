"""The measure by which trainings on a GPU are called the same."""

from __future__ import annotations

import math

import pytest
from curve_noise import MOST, against_noise, distance

REFERENCE = [3.0 * math.exp(-step / 50) for step in range(200)]


def wavering(by: float) -> list[float]:
    return [loss * (1 + by * (-1) ** step) for step, loss in enumerate(REFERENCE)]


def test_distance_is_relative():
    assert distance(wavering(0.01), REFERENCE) == pytest.approx(0.01, rel=1e-3)
    assert distance([10 * loss for loss in wavering(0.01)], [10 * loss for loss in REFERENCE]) == pytest.approx(
        0.01, rel=1e-3
    )


def test_a_curve_that_drifts_is_told_from_noise():
    noise = [wavering(0.01), wavering(-0.005)]
    alike = against_noise(wavering(-0.01), REFERENCE, noise)
    assert max(alike["all"], alike["last"]) == pytest.approx(1, rel=0.02)
    drifting = [loss * (1 + 0.0002 * step) for step, loss in enumerate(REFERENCE)]
    found = against_noise(drifting, REFERENCE, noise)
    assert found["all"] < MOST < found["last"]
    assert found["noise"] == pytest.approx(0.01, rel=1e-3)
    assert found["learned"] < 0.1
    assert max(alike.values()) < MOST
