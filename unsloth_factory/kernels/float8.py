"""Products in float8 (e4m3: 4 bits of exponent, 3 of mantissa), each row of the input with a scale of its own.

Micikevicius et al. 2022, arXiv 2209.05433. GPUs from compute capability 8.9 on compute them about twice as fast as
16-bit products, at 2 to 3 % of rounding error in each factor: not exact, and only where it is asked for.
Shapes: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch

from unsloth_factory.kernels.launch import jit, runs_kernels, runs_triton, tl

FLOAT8 = torch.float8_e4m3fn
MOST = 448.0
"""The largest number."""
TINY = 1e-12
"""Least scale: that of a row of zeros."""
BLOCK = 4096
"""Columns that a program has in its registers at a time."""
CAPABILITY = (8, 9)
"""The least that has these products."""


@jit
def _kernel(
    x_ptr, out_ptr, scales_ptr, stride,
    COLUMNS: tl.constexpr, MOST: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(x_ptr + row * stride + place, mask=place < COLUMNS, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    scale = tl.maximum(tl.max(largest) / MOST, TINY)
    tl.store(scales_ptr + row, scale)
    for start in range(0, COLUMNS, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < COLUMNS
        values = tl.load(x_ptr + row * stride + place, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(values / scale, -MOST), MOST)
        tl.store(out_ptr + row * COLUMNS + place, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8 [T, K], scales float32 [T, 1]); x is about their product.

    Args:
        x: [T, K]; its rows may be parts of longer ones.
    """
    return launch(x) if runs_triton(x) else twin(x)


def launch(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel."""
    rows, columns = x.shape
    out = torch.empty(rows, columns, dtype=FLOAT8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _kernel[(rows,)](x, out, scales, x.stride(0), COLUMNS=columns, MOST=MOST, TINY=TINY, BLOCK=BLOCK, num_warps=8)
    return out, scales


def twin(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    values = x.float()
    scales = (values.abs().amax(1, keepdim=True) / MOST).clamp_min(TINY)
    return (values / scales).clamp(-MOST, MOST).to(FLOAT8), scales


def product(
    x: torch.Tensor, scales: torch.Tensor, matrix: torch.Tensor, factor: float, dtype: torch.dtype
) -> torch.Tensor:
    """X W^T [T, N] in `dtype`, added up in float32.

    Args:
        x: float8 [T, K], contiguous.
        scales: float32 [T, 1] of its rows.
        matrix: float8 [N, K], contiguous; K and N are multiples of 16.
        factor: What its numbers are to be multiplied by.
        dtype: bfloat16 on a GPU.
    """
    if runs_kernels(x.device):
        columns = torch.full((1, len(matrix)), factor, dtype=torch.float32, device=x.device)
        return torch._scaled_mm(x, matrix.t(), scales, columns, out_dtype=dtype)
    return ((x.float() @ matrix.float().t()) * (scales * factor)).to(dtype)
