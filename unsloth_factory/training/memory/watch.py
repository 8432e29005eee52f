"""The word before the memory runs out: the high-water mark against what there is, and the trend of the last steps."""

from __future__ import annotations

from collections import deque

import numpy as np

from unsloth_factory.training.memory.meter import GIB, Reading

NEARLY_FULL = 0.95
"""Share of the limit from which the high-water mark is worth a warning."""
SETTLING = 8
"""First steps of a process, in which caches and pools fill."""
WINDOW = 32
"""Steps that a trend is read from."""
HORIZON = 20 * WINDOW
"""Steps ahead that a trend is believed for."""


class MemoryWatch:
    """Sees a reading after each step; warns once for each reason."""

    def __init__(self) -> None:
        self.seen = 0
        self.used: deque[int] = deque(maxlen=WINDOW)
        self.warned: set[str] = set()

    def warning(self, reading: Reading, steps_left: int) -> str | None:
        """What is wrong with the present figures, in words; None when nothing is, or when it has been said.

        Args:
            reading: Taken after a step, when only weights, optimizer state and what has leaked are in use.
            steps_left: Optimizer steps that the run still has to do.
        """
        self.seen += 1
        if self.seen > SETTLING:
            self.used.append(reading.used)
        if "full" not in self.warned and reading.peak > NEARLY_FULL * reading.limit:
            self.warned.add("full")
            return f"the high-water mark is {reading} ({100 * reading.peak / reading.limit:.0f} %)"
        growth = self._growth()
        if "trend" in self.warned or growth <= 0:
            return None
        steps = (reading.limit - reading.peak) / growth
        if steps >= min(steps_left, HORIZON):
            return None
        self.warned.add("trend")
        return (
            f"it grows by {growth / 2**20:.2f} MiB a step, {self.used[-1] / GIB:.2f} GiB are in use between steps, and "
            f"at this rate the {reading.limit / GIB:.2f} GiB are full in about {max(0, round(steps)):,} steps"
        )

    def _growth(self) -> float:
        """Bytes a step, or 0 where the last steps do not rise steadily: in both halves, by at least half the mean."""
        if len(self.used) < WINDOW:
            return 0.0
        values = np.asarray(self.used, dtype=np.float64)
        mean = _slope(values)
        halves = _slope(values[: WINDOW // 2]), _slope(values[WINDOW // 2 :])
        return mean if mean > 0 and min(halves) >= mean / 2 else 0.0


def _slope(values: np.ndarray) -> float:
    """Least-squares slope, per step."""
    steps = np.arange(len(values)) - (len(values) - 1) / 2
    return float((steps * values).sum() / (steps * steps).sum())
