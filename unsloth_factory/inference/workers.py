"""Batches on a CPU: several at a time, each in a thread with its share of the cores.

A step of a small model is hundreds of short operations. Split over the cores, each operation ends when the slowest core
has done its part, and a core that does something else for a moment holds up all. 200 answers of the bundled model took
60 to 148 s on two cores that had other work too, and 20 s with one batch a core; the cores spent 83 to 119 s and 35 s.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from unsloth_factory.model.loaded import LoadedModel

ResultT = TypeVar("ResultT")
Work = Callable[[list[int], threading.Event], ResultT]
"""(batch, event) -> result; once the event is set nobody waits for the result any more."""

MOST_WORKERS = 4
"""Python runs in one thread at a time: more would wait for each other between the operations."""


def run_batches(
    loaded: LoadedModel, batches: Sequence[list[int]], work: Work[ResultT]
) -> Iterator[tuple[list[int], ResultT]]:
    """(batch, what `work` makes of it), in the order in which they are done.

    On a CPU batches are worked on side by side, elsewhere one by one in the caller's thread. When the caller gives up
    (an error, a Ctrl-C), no further batch is begun and those under way are told so and waited for: a thread that is
    still computing when the interpreter goes away would abort the program.

    Args:
        loaded: The model, in evaluation mode.
        batches: Whatever indices belong together.
        work: Enters torch's inference mode by itself, which is a thread's own.
    """
    workers = _workers(loaded, len(batches))
    stopped = threading.Event()
    if workers == 1:
        for batch in batches:
            yield batch, work(batch, stopped)
        return
    cores = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as pool:
            under_way = {pool.submit(work, batch, stopped): batch for batch in batches}
            try:
                for done in as_completed(under_way):
                    yield under_way[done], done.result()
            finally:
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(cores)


def _workers(loaded: LoadedModel, batches: int) -> int:
    """How many batches at a time; 1 where a pass changes something in the model that another would see."""
    if loaded.device.type != "cpu" or loaded.quantized or loaded.engine != "standard":
        return 1
    kinds = [str(getattr(module, "rope_type", "")) for module in loaded.model.modules()]
    if any("dynamic" in kind or "longrope" in kind for kind in kinds):  # angles that change with a batch's length
        return 1
    return max(1, min(MOST_WORKERS, torch.get_num_threads(), batches))
