"""How much memory there is and how much is used: of the GPU as torch sees it, or of this machine for a CPU."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import torch

from unsloth_factory.model.host_memory import free_memory
from unsloth_factory.model.loaded import LoadedModel

GIB = 2**30


@dataclass(frozen=True)
class Reading:
    """Memory at one moment, bytes."""

    used: int
    """In use now."""
    peak: int
    """Most that was in use since `reset_peak`."""
    limit: int
    """Most that this process can have: what it has, and what is free."""

    def __str__(self) -> str:
        return f"{self.peak / GIB:.2f} GiB of {self.limit / GIB:.2f} GiB"


class Meter(Protocol):
    """Where the figures come from; tests put a small card in its place."""

    name: str
    """For messages."""
    probes: bool
    """The longest micro-batch is worth trying before the first step."""
    offloads: bool
    """There is other memory that activations can go to."""

    def read(self) -> Reading:
        """The present figures."""
        ...

    def reset_peak(self) -> None:
        """Let the peak count from now on."""
        ...

    def release(self) -> None:
        """Give back what nobody uses."""
        ...


class GpuMeter:
    """Memory of one GPU as torch's allocator accounts for it."""

    name = "GPU memory"
    probes = True
    offloads = True

    def __init__(self, device: torch.device, give_up: Callable[[], None] = lambda: None) -> None:
        self.device = device
        self.give_up = give_up

    def read(self) -> Reading:
        """The present figures; the limit heeds `set_per_process_memory_fraction` and the other users of the card."""
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = int(total * torch.cuda.get_per_process_memory_fraction(self.device))
        return Reading(
            used=torch.cuda.memory_allocated(self.device),
            peak=torch.cuda.max_memory_allocated(self.device),
            limit=min(allowed, free + torch.cuda.memory_reserved(self.device)),
        )

    def reset_peak(self) -> None:
        """Let the peak count from now on."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def release(self) -> None:
        """Free what is kept for speed, collect cycles (a failed backward pass leaves some), and empty the cache."""
        self.give_up()
        gc.collect()
        torch.cuda.empty_cache()


class HostMeter:
    """Resident memory of this process against what the machine, or its container, has left."""

    name = "memory"
    probes = False  # a step costs seconds there, and memory is there
    offloads = False

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.highest = 0

    def read(self) -> Reading:
        """The present figures."""
        held = self.process.memory_info()
        self.highest = max(self.highest, held.rss, _high_water())
        free = min([free_memory(), *_address_rooms(self.process)])
        return Reading(used=held.rss, peak=self.highest, limit=held.rss + free)

    def reset_peak(self) -> None:
        """Let the peak count from now on (Linux's own high-water mark too, where that is allowed)."""
        self.highest = 0
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def release(self) -> None:
        """Collect cycles."""
        gc.collect()


def meter_of(loaded: LoadedModel) -> Meter:
    """The meter of a model's device."""
    return GpuMeter(loaded.device, loaded.give_up_memory) if loaded.device.type == "cuda" else HostMeter()


def _high_water() -> int:
    """Largest resident size so far, bytes; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 0


def _address_rooms(process: psutil.Process) -> list[int]:
    """Bytes of address space that are left (`ulimit -v`), where there is a limit."""
    if not hasattr(psutil, "RLIMIT_AS"):
        return []
    limit = process.rlimit(psutil.RLIMIT_AS)[0]
    return [] if limit == psutil.RLIM_INFINITY else [max(0, limit - process.memory_info().vms)]
