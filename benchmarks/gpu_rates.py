"""What the planner's table of GPUs needs of the card at hand: matrix products, bandwidth, attention, context.

python benchmarks/gpu_rates.py
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

PRODUCTS = ((8192, 8192, 8192), (8192, 4096, 12288), (2048, 4096, 4096), (2048, 2048, 6144), (2048, 4096, 1024),
            (512, 2048, 2048), (2048, 4096, 16), (2048, 16, 12288))  # fmt: skip


def clock(function: Callable[[], Any], repeats: int = 10) -> float:
    """Seconds of one call, the mean of some after three."""
    for _ in range(3):
        function()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats / 1e3


def normal(*shape: int) -> torch.Tensor:
    """Random bfloat16 numbers on the card."""
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def context() -> None:
    """Memory that a process takes beside torch's allocator."""
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    before = total - free - torch.cuda.memory_reserved()
    F.linear(normal(64, 64), normal(64, 64))
    free, total = torch.cuda.mem_get_info()
    after = total - free - torch.cuda.memory_reserved()
    figures = {
        "gpu": torch.cuda.get_device_name(0),
        "total_memory": torch.cuda.get_device_properties(0).total_memory,
        "mem_get_info_total": total,
        "context": before,
        "context_with_cublas": after,
        "allocated_after_one_product": torch.cuda.memory_allocated(),
    }
    print(json.dumps(figures))
    smi = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader"]
    print("nvidia-smi:", subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip(), flush=True)


def products() -> None:
    """Matrix products, and memory moved."""
    for rows, inner, width in PRODUCTS:
        x, w = normal(rows, inner), normal(width, inner)
        seconds = clock(lambda x=x, w=w: F.linear(x, w))
        rate = 2 * rows * inner * width / seconds / 1e12
        print(f"product {rows} x {inner} x {width}: {rate:.0f} TFLOP/s, {seconds * 1e6:.1f} us", flush=True)
    x, y = normal(2**30), normal(2**30)
    print(f"copy of 2 GiB: {4 * 2**30 / clock(lambda: y.copy_(x)) / 1e12:.2f} TB/s")
    small, other = x[: 2**23], y[: 2**23]
    print(f"a * b, 16 MiB each: {6 * 2**23 / clock(lambda: small * other) / 1e12:.2f} TB/s")
    print(f"16 MiB to float32: {6 * 2**23 / clock(lambda: small.float()) / 1e12:.2f} TB/s")


def attention(length: int, masked: bool) -> None:
    """Time, memory and kernels with 32 query and 8 key heads of 128, as transformers calls it."""
    groups = 32 if masked else 8
    q, k, v = (normal(1, length, n, 128).transpose(1, 2).requires_grad_() for n in (32, groups, groups))
    mask = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()[None, None] if masked else None

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=not masked)

    gradient = torch.randn_like(forward())
    with torch.no_grad():
        ahead = clock(forward)
    back = clock(lambda: forward().backward(gradient)) - ahead
    operations = 4 * length * length * 4096
    q.grad = k.grad = v.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = forward()
    kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    inner = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out.backward(gradient)
    back_peak = torch.cuda.max_memory_allocated() - inner
    print(f"attention {length} {'mask' if masked else 'causal'}: forward {ahead * 1e6:.0f} us = "
          f"{operations / ahead / 1e12:.0f} TFLOP/s of the full square, backward {back * 1e6:.0f} us = "
          f"{2.5 * operations / back / 1e12:.0f}; bytes a token: kept {kept / length:.0f}, forward peak "
          f"{peak / length:.0f}, backward peak {back_peak / length:.0f}", flush=True)  # fmt: skip
    if length == 2048:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            forward().backward(gradient)
        print("  kernels:", [event.key[:60] for event in profile.key_averages()][:9], flush=True)


if __name__ == "__main__":
    context()
    products()
    for with_mask in (False, True):
        for tokens in (1024, 2048, 4096, 8192):
            attention(tokens, with_mask)
