"""What an export prints: lines, and one progress bar over bytes when a terminal is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from unsloth_factory.export.result import ExportResult


def say(text: str, *, warn: bool = False) -> None:
    """Print one line as it is (brackets in a path are no markup); a warning is yellow on a terminal."""
    Console(highlight=False, soft_wrap=True).print(text, markup=False, style="yellow" if warn else None)


@contextmanager
def byte_progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over `total` bytes; gives the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda amount: progress.advance(task, amount)


def summary_line(result: ExportResult) -> str:
    """One line about a finished export."""
    size = f"{result.bytes / 2**30:.2f} GiB" if result.bytes >= 2**30 else f"{result.bytes / 2**20:.1f} MiB"
    return f"{result.path}: {size} in {result.seconds:.1f} s"
