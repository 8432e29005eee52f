"""A counter on the terminal; one plain line in ten where there is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def counting(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Gives a callback (done, total) that shows how far the work is."""
    if not console.is_terminal:
        yield _plain(console, title)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(console: Console, title: str) -> Callable[[int, int], None]:
    started = time.monotonic()
    printed = 0

    def show(done: int, total: int) -> None:
        nonlocal printed
        if done * 10 // total > printed * 10 // total or done == total:
            seconds = time.monotonic() - started
            console.print(f"{title} {done}/{total} ({seconds:.0f} s)", highlight=False, markup=False)
            printed = done

    return show
