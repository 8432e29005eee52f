"""NF4 weights as float8, either way round: float8 products want both factors with the summed index innermost.

So the forward pass needs W [N, K] and the backward pass W^T [K, N]. The maxima are scaled beforehand such that the
largest weight of the matrix is the largest float8 number. `nf4` has a kernel of its own for 16 bit: its addresses suit
rows of 16-bit numbers, and a wrong one made it ten times as slow.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from unsloth_factory.kernels.float8 import FLOAT8, MOST
from unsloth_factory.kernels.launch import jit, runs_triton, tl
from unsloth_factory.kernels.nf4 import BLOCK_SIZE, Packed, maxima, maximum_of
from unsloth_factory.kernels.nf4 import twin as sixteen_bit_twin

ROWS = 128
"""Rows of a tile of 64 columns that a program unpacks."""


def scaled(packed: Packed) -> tuple[Packed, float]:
    """(the same weights times such a number that the largest is `float8.MOST`, what brings them back)."""
    factor = float(maxima(packed).abs().amax()) / MOST or 1.0
    return replace(packed, scales=packed.scales / factor, offsets=packed.offsets / factor), factor


@jit
def _kernel(
    codes_ptr, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr, code_ptr, absmax_code_ptr, out_ptr,
    rows, columns, MOST: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    group = tl.program_id(1)
    block = row * (columns // 64) + group
    maximum = maximum_of(
        block, known, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr, absmax_code_ptr, PARTS
    )[:, None]
    byte = tl.arange(0, 32)[None, :]
    inside = known[:, None] & (byte < 32)
    packed = tl.load(codes_ptr + block[:, None] * 32 + byte, mask=inside, other=0).to(tl.int32)
    dtype = out_ptr.dtype.element_ty
    high = tl.minimum(tl.maximum(tl.load(code_ptr + (packed >> 4)) * maximum, -MOST), MOST).to(dtype)
    low = tl.minimum(tl.maximum(tl.load(code_ptr + (packed & 15)) * maximum, -MOST), MOST).to(dtype)
    if TRANSPOSED:  # 128 numbers of a column side by side
        place = (group * 64 + 2 * byte) * rows + row[:, None]
        tl.store(out_ptr + place, high, mask=inside)
        tl.store(out_ptr + place + rows, low, mask=inside)
    else:  # both weights of a byte in one store of 16 bits
        first = high.to(tl.int8, bitcast=True).to(tl.int16) & 0xFF
        both = first | (low.to(tl.int8, bitcast=True).to(tl.int16) << 8)
        pair = block[:, None] * 32 + byte
        tl.store(out_ptr.to(tl.pointer_type(tl.int16)) + pair, both, mask=inside)


def dequantize(packed: Packed, *, transposed: bool) -> torch.Tensor:
    """Float8 [N, K], or [K, N] where `transposed`, of what `scaled` made."""
    return launch(packed, transposed) if runs_triton(packed.codes) else twin(packed, transposed)


def launch(packed: Packed, transposed: bool) -> torch.Tensor:
    """The Triton kernel."""
    rows, columns = packed.shape
    assert columns % BLOCK_SIZE == 0
    assert rows * columns < 2**31
    out = torch.empty(packed.shape[::-1] if transposed else packed.shape, dtype=FLOAT8, device=packed.codes.device)
    _kernel[(-(-rows // ROWS), columns // BLOCK_SIZE)](
        packed.codes, packed.absmax, packed.scales, packed.offsets, packed.starts, packed.scale_starts, packed.code,
        packed.absmax_code, out, rows, columns,
        MOST=MOST, PARTS=len(packed.offsets), ROWS=ROWS, TRANSPOSED=transposed, num_warps=4,
    )  # fmt: skip
    return out


def twin(packed: Packed, transposed: bool) -> torch.Tensor:
    """The same in plain torch."""
    values = sixteen_bit_twin(packed, torch.empty(packed.shape, device=packed.codes.device)).clamp(-MOST, MOST)
    return (values.t() if transposed else values).contiguous().to(FLOAT8)
