"""What is known of GPUs by name: memory, speed, compute capability; and of the one in this machine.

Only the H200 was measured (benchmarks/gpu_rates.py, 2026-11-22). The others are NVIDIA's data sheets times a factor for
what is sustained, and are called a model wherever they are printed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from unsloth_factory.config.errors import UsageError

GIB = 2**30
SUSTAINED = 0.8
"""Matrix products: 791 TFLOP/s on the H200 of 989 on its data sheet (dense bf16, float32 sums)."""
SUSTAINED_BANDWIDTH = 0.88
"""A copy: 4.24 TB/s on the H200 of 4.8."""
CONTEXT = 0.45
"""GiB of a CUDA context with cuBLAS, where it was not measured."""
ROUGH_SHARE = 0.95
"""Of a size such as "16GB": what torch sees of it. 12 GB cards show 11.76 GiB, a T4 14.56, a 4090 23.6."""


@dataclass(frozen=True)
class Gpu:
    """One kind of card. Rates are None where nothing is known of them."""

    name: str
    memory: int
    """Bytes that torch reports as total_memory."""
    products: float | None = None
    """16-bit matrix products with float32 sums, sustained, FLOP/s."""
    bandwidth: float | None = None
    """A large copy, sustained, bytes/s read plus written."""
    capability: tuple[int, int] = (8, 0)
    context: int = int(CONTEXT * GIB)
    """Bytes of a CUDA context, which torch's figures leave out."""
    measured: bool = False
    source: str = ""

    @property
    def room(self) -> int:
        """Bytes that torch's allocator can have."""
        return self.memory - self.context


def _sheet(
    name: str,
    gib: float,
    tflops: float,
    gb_per_second: float,
    capability: tuple[int, int],
    sustained: float = SUSTAINED,
) -> Gpu:
    """A card from its data sheet: dense 16-bit TFLOP/s with float32 sums, GB/s."""
    return Gpu(
        name=name,
        memory=int(gib * GIB),
        products=sustained * tflops * 1e12,
        bandwidth=SUSTAINED_BANDWIDTH * gb_per_second * 1e9,
        capability=capability,
        source=f"data sheet: {tflops:g} TFLOP/s, {gb_per_second:g} GB/s; {sustained:.0%} sustained",
    )


GPUS = {
    # 70 W hold a T4 to about 24 TFLOP/s in 4096^3 fp16 products (NVIDIA's developer forum), an L4 to about half.
    "T4": _sheet("T4", 14.56, 65, 320, (7, 5), sustained=0.37),
    "L4": _sheet("L4", 22.16, 121, 300, (8, 9), sustained=0.5),
    "3060": _sheet("RTX 3060", 11.76, 25.6, 360, (8, 6)),
    "4090": _sheet("RTX 4090", 23.6, 165.2, 1008, (8, 9)),
    "A100": _sheet("A100 40GB", 39.5, 312, 1555, (8, 0)),
    "A100-80GB": _sheet("A100 80GB", 79.2, 312, 2039, (8, 0)),
    "H100": _sheet("H100 80GB", 79.2, 989, 3350, (9, 0)),
    "H200": Gpu(
        "H200", 150_109_880_320, 791e12, 4.24e12, (9, 0), context=int(0.75 * GIB), measured=True,
        source="measured: benchmarks/gpu_rates.py, 2026-11-22",
    ),
}  # fmt: skip


def find_gpu(name: str) -> Gpu:
    """A card by its name, or by its memory alone ("16GB").

    Raises:
        UsageError: Neither.
    """
    word = re.sub(r"^RTX[ _-]*", "", name.strip().upper())
    if word in GPUS:
        return GPUS[word]
    size = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GB|GIB|G)", word)
    if size and float(size[1]) > 0:
        return Gpu(f"{size[1]} GB", int(float(size[1]) * ROUGH_SHARE * GIB), source="memory alone")
    raise UsageError(f"--gpu {name}: unknown. Known: {', '.join(GPUS)}, a size such as 16GB, or auto.")


def present_gpu() -> Gpu | None:
    """The card of this machine as torch reports it, with the rates of its kind, or measured where these are unknown."""
    import torch

    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    gpu = _recognised(properties.name, properties.total_memory, torch.cuda.get_device_capability(index))
    return gpu if gpu.products is not None else _measured(gpu)


def _measured(gpu: Gpu) -> Gpu:
    """The card in this machine with the rates of a 4096^3 product and of a copy."""
    import torch

    dtype = torch.bfloat16 if gpu.capability >= (8, 0) else torch.float16
    first, second = (torch.randn(4096, 4096, device="cuda", dtype=dtype) for _ in range(2))
    products = 2 * 4096**3 / _seconds(torch.matmul, first, second)
    source = torch.randn(2**26, device="cuda", dtype=dtype)
    bandwidth = 4 * 2**26 / _seconds(torch.empty_like(source).copy_, source)
    del first, second, source
    torch.cuda.empty_cache()
    return replace(gpu, products=products, bandwidth=bandwidth, measured=True, source="measured here")


def _seconds(function: Callable[..., Any], *arguments: Any, repeats: int = 20) -> float:
    """Time of one call on the card."""
    import torch

    for _ in range(5):
        function(*arguments)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function(*arguments)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats / 1e3


def _recognised(name: str, memory: int, capability: tuple[int, int]) -> Gpu:
    """The table's card whose name occurs in the driver's one and whose memory is within 10 %; else without rates."""
    words = re.split(r"[\s-]+", name.upper())
    for key, known in GPUS.items():
        if key.split("-")[0] in words and abs(known.memory - memory) < 0.1 * memory:
            return replace(known, name=name, memory=memory, capability=capability)
    return Gpu(name, memory, capability=capability, source="not in the table")
