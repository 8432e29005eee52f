"""Several requests to a server under way at a time, from threads that never hold the program back at its end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def in_parallel(
    work: Callable[[ItemT], ResultT], items: Sequence[ItemT], workers: int
) -> Iterator[tuple[int, ResultT | Exception]]:
    """(index, result or the exception that it ended in) of each item, as they are done.

    Closing the iterator, or a Ctrl-C in the caller, starts no further item; what is under way is forgotten (the threads
    are daemons: a request that takes minutes does not keep the program alive).
    """
    waiting: queue.SimpleQueue[tuple[int, ItemT]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    for pair in enumerate(items):
        waiting.put(pair)

    def run() -> None:
        while not stop.is_set():
            try:
                index, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((index, work(item)))
            except Exception as error:  # the caller decides what it means
                done.put((index, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=run, daemon=True).start()
    try:
        for _ in items:
            yield done.get()
    finally:
        stop.set()
