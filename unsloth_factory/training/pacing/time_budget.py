"""`--time_budget`: what a run does takes time that is measured, and the rest of the run is planned to end within it.

The budget covers everything from the start of the process to its exit. What a step, an evaluation, a save and the loss
plot take is measured as the run goes on, each of them once early on purpose. From that follows how many more steps fit
beside a reserve for what comes after the last one: evaluation, checkpoint, final weights, plot, exit. The learning rate
follows a progress from 0 to 1 that every step advances by its share of the time that is left, so it is down when the
time is up, however the speed changes on the way. When one more slow step would not leave the reserve, the run ends.
`pace.py` applies this to a running training.

Progress and the share of the next step are in the state of a checkpoint: a run that was killed goes on with the
weights, optimizer and rate that it had, in a new budget from the start of the new process. It cannot end with the bits
of the undisturbed run, because the time decides how many steps there are.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from statistics import fmean

import psutil

WINDOW = 50
"""Latest durations that count: the speed of a shared machine changes."""
OUTDATED = 2.2
"""Beyond this ratio it is no noise: the machine's load, or the length of the answers, has changed."""
REHEARSAL_STEP = 3
"""Step after which evaluation, save and plot are tried once."""
REHEARSAL_SHARE = 0.05
"""... or earlier, when the steps have taken this share of the time."""
MOST_SECOND_TRY = 0.05
"""Share of the budget that one of them may take to be tried again at half-time: speed and answers change."""
MOST_EVALUATION = 0.15
"""Share of the time left that the first evaluation may take until it is given up."""

END = "time budget"
"""How the reason of an early end begins."""


def process_started() -> float:
    """The instant at which this process was started, on the clock of `time.monotonic`, s."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            since_boot = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        age = time.time() - psutil.Process().create_time()
    return time.monotonic() - max(0.0, age)


class Cost:
    """Durations of one kind of work, s."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=WINDOW)

    @property
    def mean(self) -> float:
        """Of the latest; 0 before the first."""
        return fmean(self.values) if self.values else 0.0

    @property
    def high(self) -> float:
        """What the next one may take: hardly ever more. What took far longer than the latest counts no more."""
        if not self.values:
            return 0.0
        count, latest, mean = len(self.values), self.values[-1], self.mean
        if count < 8:
            return max(value for value in self.values if value <= OUTDATED * latest) * (1 + max(0.15, 0.5 / count))
        return mean + 3 * math.sqrt(fmean((value - mean) ** 2 for value in self.values))


class TimeBox:
    """Clock, measured costs, and what still fits. Without a budget everything does.

    Args:
        seconds: The budget; infinite for none.
        started: When it began, on `clock`.
        closing: Time after the last step that is known beforehand, s.
        clock: Current time, s.
    """

    def __init__(
        self,
        seconds: float = math.inf,
        started: float = 0.0,
        closing: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds = seconds
        self.started = started
        self.clock = clock
        self.costs = {kind: Cost() for kind in ("step", "evaluation", "save", "plot")}
        self.evaluates = True
        """Evaluations are done; False once one took too long."""
        self.fitting: int | None = None
        """Steps that are expected to follow; None before that is known."""
        self._counts = dict.fromkeys(self.costs, 0)
        self._unpaced = 0
        self._closing = closing
        self._saves_at_end = 2.0
        self._mark = self._opened = clock()

    @property
    def limited(self) -> bool:
        """There is a budget."""
        return self.seconds < math.inf

    @property
    def used(self) -> float:
        """Time since the start, s."""
        return self.clock() - self.started

    @property
    def left(self) -> float:
        """Time to the end of the budget, s."""
        return self.seconds - self.used

    def open(self, saves_at_end: float = 2.0) -> None:
        """The first step begins.

        Args:
            saves_at_end: What is written and read after the last step, in checkpoints.
        """
        self._saves_at_end = saves_at_end
        self._mark = self._opened = self.clock()
        # Leaving the process took 0.2 to 0.3 s where entering took 10 to 15; a slow machine is slow at both.
        self._closing += 0.2 + 0.03 * self.used + min(15.0, 0.2 + 0.005 * self.seconds)

    def lap(self, kind: str | None) -> None:
        """The time since the last lap went into one piece of such work; None: into something else."""
        now, before = self.clock(), self._mark
        self._mark = now
        if kind is None:
            return
        self._counts[kind] += 1
        self._unpaced += kind == "step"
        if self._counts[kind] == 2 and kind in ("step", "plot"):
            self.costs[kind].values.clear()  # the first is slow: memory is taken, code is loaded
        self.costs[kind].values.append(now - before)

    def to_try(self, kind: str) -> bool:
        """This has to be done to know what it takes: early, and again at half-time unless it takes long.

        The plot is drawn twice early, because the first loads its library.
        """
        early, count = 2 if kind == "plot" else 1, self._counts[kind]
        if count == early and self.used >= 0.5 * (self._opened - self.started + self.seconds):
            return self.costs[kind].high <= MOST_SECOND_TRY * self.seconds
        return count < early and self.measured

    @property
    def rehearsed(self) -> bool:
        """Everything that comes after the last step was tried."""
        return self._counts["plot"] == 2

    @property
    def measured(self) -> bool:
        """There were steps enough to plan by."""
        spent = self.clock() - self._opened
        steps = self._counts["step"]
        return steps >= REHEARSAL_STEP or (steps > 0 and spent >= REHEARSAL_SHARE * (self.left + spent))

    def reserve(self, *, evaluation: bool = True) -> float:
        """Time to keep for what comes after the last step, s."""
        final = self.costs["evaluation"].high if evaluation and self.evaluates else 0.0
        return final + self._saves_at_end * self.costs["save"].high + self.costs["plot"].high + self._closing

    def step_fits(self, before: Collection[str] = ()) -> bool:
        """One more step fits, with other work before it."""
        extra = sum(self.costs[kind].high for kind in before)
        return self.left - self.reserve() - extra >= self.costs["step"].high

    def steps_that_fit(self, most: int, evaluation_steps: int, save_steps: int) -> int:
        """Estimate of the steps that still fit, with the regular evaluations and saves among them.

        Args:
            most: Steps that there are to do.
            evaluation_steps: Steps between evaluations.
            save_steps: Steps between saves.
        """
        a_step = self.costs["step"].mean + self.costs["save"].mean / save_steps
        if self.evaluates:
            a_step += self.costs["evaluation"].mean / evaluation_steps
        room = max(0.0, self.left - self.reserve())
        return most if room >= most * a_step else int(room / a_step)

    def advance(self, progress: float, fitting: int) -> tuple[float, float]:
        """(progress after the steps since the last call, share of the next one) when `fitting` steps are to come.

        Until the speed is known the progress waits: a first step is so slow that it would take the whole warm-up.
        """
        if self.limited and not self.measured:
            return progress, (1.0 - progress) / max(1, fitting)
        done, self._unpaced = self._unpaced, 0
        rest = (1.0 - progress) * fitting / (fitting + done)
        return 1.0 - rest, rest / max(1, fitting)

    def evaluation_limit(self, *, final: bool) -> float:
        """Time that the evaluation at hand may take, s. The last one matters more than the plot."""
        room = self.left - self.reserve(evaluation=False)
        if final:
            return room + self.costs["plot"].high
        return room if self._counts["evaluation"] else min(room, MOST_EVALUATION * self.left)

    @property
    def plot_fits(self) -> bool:
        """The loss plot leaves time for the exit."""
        return self.left - self._closing >= self.costs["plot"].high
