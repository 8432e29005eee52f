"""A card whose allocator can be made to fail anywhere, on a CPU: it counts what torch's operations allocate."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unsloth_factory.training.memory.meter import Reading

ROOMY = 2**40
POOLED = 512
"""Bytes up to which an allocation never fails for want of room: such blocks come out of larger ones that are held."""


class FakeCard(TorchDispatchMode):
    """While it is on, every operation whose result takes new memory is an allocation, numbered from 0.

    Operations in place allocate nothing and never fail, as on a real card. The memory of a result counts until its
    storage dies. Two ways to fail: once, at the allocation `strike`; or, from the allocation `since` on, whenever more
    than `limit` bytes would be in use.
    """

    def __init__(self, *, strike: int | None = None, limit: int = ROOMY, since: int = 0) -> None:
        super().__init__()
        self.strike, self.limit, self.since = strike, limit, since
        self.count = self.used = self.peak = self.failures = 0
        self.sizes: dict[int, int] = {}
        self.phases: list[str] | None = None
        """Where each allocation took place; a list to begin with, if it is wanted."""
        self.history: list[int] = []
        """Bytes in use after each of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        fresh = {s._cdata: s for s in storages(result) if s._cdata not in self.sizes}
        if fresh:
            for given in storages((args, kwargs)):
                fresh.pop(given._cdata, None)
        if fresh:
            self._allocate(fresh, func)
        return result

    def _allocate(self, fresh: dict[int, Any], operation: Any) -> None:
        number, size = self.count, sum(s.nbytes() for s in fresh.values())
        self.count += 1
        if self.phases is not None:
            self.phases.append(self._phase())
        full = number >= self.since and self.used + size > self.limit and size > POOLED
        if full or number == self.strike:
            self.failures += 1
            raise torch.OutOfMemoryError(
                f"fake card out of memory: {operation} asks for {size} bytes, {self.used} in use"
            )
        for key, one in fresh.items():
            self.sizes[key] = one.nbytes()
            self.used += one.nbytes()
            weakref.finalize(one, self._free, key)
        self.peak = max(self.peak, self.used)
        self.history.append(self.used)

    def _free(self, key: int) -> None:
        self.used -= self.sizes.pop(key)

    def _phase(self) -> str:
        names = set()
        frame = sys._getframe(3)
        while frame is not None:
            names.add(frame.f_code.co_name)
            frame = frame.f_back
        if torch._C._current_graph_task_id() != -1:
            return "recompute" if torch.is_grad_enabled() else "backward"
        for function, phase in (
            ("evaluate", "evaluation"), ("clip_grad_norm_", "clip"), ("apply_update", "update"), ("loss", "forward"),
            ("run_step", "between"),
        ):  # fmt: skip
            if function in names:
                return phase
        return "elsewhere"


def storages(value: Any) -> Iterator[Any]:
    """The memory behind the tensors of a nested value."""
    if isinstance(value, torch.Tensor):
        found = value.untyped_storage()
        if found.nbytes():
            yield found
    elif isinstance(value, list | tuple):
        for item in value:
            yield from storages(item)
    elif isinstance(value, dict):
        yield from storages(list(value.values()))


class FakeMeter:
    """What the card shows of itself."""

    name = "GPU memory"
    offloads = False

    def __init__(self, card: FakeCard, probes: bool) -> None:
        self.card, self.probes = card, probes

    def read(self) -> Reading:
        return Reading(self.card.used, self.card.peak, self.card.limit)

    def reset_peak(self) -> None:
        self.card.peak = self.card.used

    def release(self) -> None:
        gc.collect()
