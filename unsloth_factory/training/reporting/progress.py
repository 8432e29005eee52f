"""What a training shows: one live line on a terminal, plain lines elsewhere (files, pipes, notebooks)."""

from __future__ import annotations

import math
import os
import time
from statistics import fmean, harmonic_mean
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

LABEL_WIDTH = 12


class Progress:
    """Prints lines and the progress of the steps. A context manager; the live line lives inside it."""

    def __init__(self, console: Console | None, logging_steps: int) -> None:
        # under `accelerate launch` the first process speaks for all
        self.console = Console(quiet=True) if os.environ.get("RANK", "0") != "0" else console or Console()
        self.logging_steps = logging_steps
        # rich redraws a whole output cell in a notebook; plain lines read better there
        self.live = self.console.is_terminal and not self.console.is_jupyter
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._total = 0
        self._first = 0
        self._started = 0.0
        self._since_line: list[tuple[float, float]] = []

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str | Text) -> None:
        """Print text (above the live line, if there is one)."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, step: int, total: int) -> None:
        """Begin to count at `step` of `total`."""
        self._total, self._first, self._started = total, step, time.monotonic()
        if not self.live:
            return
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=self.console,
        )
        self._task = self._bar.add_task("train", total=total, completed=step, figures="")
        self._bar.start()

    def step(self, step: int, *, loss: float, rate: float, tokens_per_second: float, memory: int) -> None:
        """Show one finished step; a plain line shows the mean loss and speed of the steps since the last one.

        Args:
            step: Optimizer steps done.
            loss: Mean loss of the step.
            rate: Learning rate of the step.
            tokens_per_second: Real tokens, over the time of the step.
            memory: Peak so far, bytes.
        """
        self._since_line.append((loss, tokens_per_second))
        prints = not self.live and (step % self.logging_steps == 0 or step == self._total)
        if prints:
            loss, tokens_per_second = _means(self._since_line)
            self._since_line.clear()
        figures = f"loss {loss:.4f}  lr {rate:.2e}  {tokens_per_second:,.0f} tok/s  {memory / 2**30:.2f} GiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures=figures)
        elif prints:
            self.say(f"step {step}/{self._total}  {figures}  ETA {self._remaining(step)}")

    def replan(self, total: int) -> None:
        """The number of steps, as it is estimated now."""
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def rewind(self, step: int) -> None:
        """Count on from an earlier step."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def _remaining(self, step: int) -> str:
        done = max(1, step - self._first)
        return duration((time.monotonic() - self._started) / done * (self._total - step))


def _means(steps: list[tuple[float, float]]) -> tuple[float, float]:
    """(mean loss, mean tokens per second) of some steps; those without a finite loss were not applied."""
    losses = [loss for loss, _ in steps if math.isfinite(loss)]
    return fmean(losses) if losses else math.nan, harmonic_mean([speed for _, speed in steps])


def print_labelled(console: Console, line: str) -> None:
    """Print a line "Label       text", its label in 12 columns; on a terminal the text wraps beside the label."""
    label, text = line[:LABEL_WIDTH], line[LABEL_WIDTH:]
    if not console.is_terminal or not label.endswith(" "):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
        return
    grid = Table.grid()
    grid.add_column(width=LABEL_WIDTH)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label), Text(text))
    console.print(grid)


def duration(seconds: float) -> str:
    """A time span in its two largest units: 45s, 3m12s, 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def peak_memory(device: torch.device) -> int:
    """Most memory that was in use so far, bytes: allocated on the GPU, or resident in the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where the CPU figure is left out

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
