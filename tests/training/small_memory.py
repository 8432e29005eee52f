"""Cards whose memory runs out when a test says so, and gauges that show what they are told."""

from __future__ import annotations

import gc
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from unsloth_factory.training.memory.meter import GIB, Reading
from unsloth_factory.training.methods import LossSum, Sft
from unsloth_factory.training.reporting.progress import Progress
from unsloth_factory.training.session import Session, open_session


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is in memory now need not be looked at each time that the memory runs out (0.3 s)."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class SmallCard(Sft):
    """Runs out of memory, from its n-th micro-batch on, with more than some samples."""

    def __init__(self, most: int, start: int = 0) -> None:
        self.most, self.start, self.calls = most, start, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        if self.calls > self.start and len(batch.sources) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part


class Gauge:
    """A meter that shows what it is told."""

    name = "GPU memory"
    offloads = False

    def __init__(self, *readings: Reading, probes: bool = False) -> None:
        self.readings, self.probes = list(readings) or [Reading(GIB, GIB, 8 * GIB)], probes

    def read(self) -> Reading:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def reset_peak(self) -> None:
        pass

    def release(self) -> None:
        pass


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(job: Any) -> Session:
    return open_session(job, Progress(Console(file=io.StringIO()), 1))


def bits(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Hashes of all tensors of the run, and its metrics without what the clock decides."""
    volatile = ("time", "tokens_per_second", "memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hashes = {path.relative_to(folder).as_posix(): tensor_hash(path) for path in sorted(folder.rglob("*.safetensors"))}
    return hashes, [{key: value for key, value in line.items() if key not in volatile} for line in lines]


def tensor_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor).encode())
    return digest.hexdigest()
