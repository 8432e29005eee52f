"""NF4 with double quantisation back to 16 bit (Dettmers et al. 2023, arXiv 2305.14314), in one pass over memory.

A weight [N, K] is stored as two 4-bit codes a byte, the earlier element in the high half; every 64 elements share a
maximum, itself an 8-bit code: maximum = absmax_code[absmax] * absmax_scale[block of 256 maxima] + offset. The values
are those of bitsandbytes, bit for bit. Several matrices, each quantised by itself, may lie one below the other in one
packed weight; each keeps its own offset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth_factory.kernels.launch import jit, runs_triton, tl

BLOCK_SIZE = 64
"""Weights that share a maximum."""
NESTED_SIZE = 256
"""Maxima that share a scale."""
PROGRAM_BYTES = 1024
"""Packed bytes a program unpacks: 2,048 weights, 32 maxima."""
WARPS = 1
ROW_UNIT = 8
"""Numbers: rows of the result begin at multiples of it, so that 16 bytes are written at once."""


@dataclass(frozen=True)
class Packed:
    """One or more matrices of K columns, a multiple of 64, quantised one by one and stacked to [N, K]."""

    codes: torch.Tensor
    """uint8 [N K / 2]"""
    absmax: torch.Tensor
    """uint8 [N K / 64]"""
    scales: torch.Tensor
    """float32: the parts' scales of maxima, one part after the other"""
    offsets: torch.Tensor
    """float32 [parts]: the mean maximum that was subtracted"""
    starts: torch.Tensor
    """int64 [parts]: index of each part's first maximum"""
    scale_starts: torch.Tensor
    """int64 [parts]: index of each part's first scale"""
    code: torch.Tensor
    """float32 [16]: the NF4 values"""
    absmax_code: torch.Tensor
    """float32 [256]: the values of the 8-bit maxima"""
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(t.nbytes for t in (self.codes, self.absmax, self.scales))


@jit
def maximum_of(
    block, known, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr, absmax_code_ptr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Within a kernel: what the codes of some blocks of 64 weights are multiplied by."""
    start = block * 0
    scale_start = block * 0
    offset = tl.load(offsets_ptr) + 0.0 * block.to(tl.float32)
    for part in tl.static_range(1, PARTS):
        boundary = tl.load(starts_ptr + part).to(tl.int32)
        later = block >= boundary
        start = tl.where(later, boundary, start)
        scale_start = tl.where(later, tl.load(scale_starts_ptr + part).to(tl.int32), scale_start)
        offset = tl.where(later, tl.load(offsets_ptr + part), offset)
    maximum = tl.load(absmax_code_ptr + tl.load(absmax_ptr + block, mask=known, other=0).to(tl.int32))
    scale = tl.load(scales_ptr + scale_start + (block - start) // 256, mask=known, other=0.0)
    return maximum * scale + offset


@jit
def _kernel(
    codes_ptr, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr,
    code_ptr, absmax_code_ptr, out_ptr, extra_ptr, extra_out_ptr,
    total, columns, stride_units, extra_total, extra_columns, programs,
    PARTS: tl.constexpr, BLOCKS: tl.constexpr, HALF: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    stride = stride_units * UNIT  # so that the compiler knows what divides it
    if program >= programs:
        number = (program - programs) * BLOCKS * 64 + tl.arange(0, BLOCKS * 64)
        inside = number < extra_total
        line = number // extra_columns
        copied = tl.load(extra_ptr + number, mask=inside)
        tl.store(extra_out_ptr + line * stride + (number - line * extra_columns), copied, mask=inside)
    else:
        block = program * BLOCKS + tl.arange(0, BLOCKS)
        known = block * 32 < total
        maximum = maximum_of(
            block, known, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr, absmax_code_ptr, PARTS
        )[:, None]
        place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        packed = tl.load(codes_ptr + place, mask=place < total, other=0).to(tl.int32)
        dtype = out_ptr.dtype.element_ty
        high = (tl.load(code_ptr + (packed >> 4)) * maximum).to(dtype)
        low = (tl.load(code_ptr + (packed & 15)) * maximum).to(dtype)
        # one row for each block of 64 weights: blocks end where rows do
        row = (block * 32 // (columns // 2))[:, None]
        # Counted in pairs: (2 x) // 2 would hide from the compiler that neighbours lie side by side, and without wide
        # stores the kernel took 10 times as long.
        pair = row * (stride // 2) + (place - row * (columns // 2))
        if HALF:  # both weights of a byte in one store of 32 bits
            first = high.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
            both = first | (low.to(tl.int16, bitcast=True).to(tl.int32) << 16)
            tl.store(out_ptr.to(tl.pointer_type(tl.int32)) + pair, both, mask=place < total)
        else:
            tl.store(out_ptr + 2 * pair, high, mask=place < total)
            tl.store(out_ptr + 2 * pair + 1, low, mask=place < total)


def dequantize(
    packed: Packed,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    extra: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The weights [N, K] in `dtype`.

    Args:
        packed: 2^31 weights at most.
        dtype: Of the result.
        out: Where they are written; its rows may be longer than K.
        extra: (contiguous matrix, a place for it with the rows of `out`), copied by the same launch.
    """
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    return launch(packed, out, extra) if runs_triton(packed.codes) else twin(packed, out, extra)


def launch(packed: Packed, out: torch.Tensor, extra: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """The Triton kernel."""
    total, columns = packed.codes.numel(), packed.shape[1]
    assert out.shape[0] * out.stride(0) < 2**31
    assert columns % BLOCK_SIZE == 0
    half = out.element_size() == 2
    assert out.stride(0) % ROW_UNIT == 0
    assert out.data_ptr() % 16 == 0
    source, place = extra or (out[:0], out[:0])
    assert extra is None or (source.is_contiguous() and place.stride(0) == out.stride(0))
    programs = -(-total // PROGRAM_BYTES)
    copies = -(-source.numel() // (2 * PROGRAM_BYTES))
    _kernel[(programs + copies,)](
        packed.codes, packed.absmax, packed.scales, packed.offsets, packed.starts, packed.scale_starts, packed.code,
        packed.absmax_code, out, source, place, total, columns, out.stride(0) // ROW_UNIT, source.numel(),
        max(1, source.shape[1]), programs,
        PARTS=len(packed.offsets), BLOCKS=PROGRAM_BYTES // 32, HALF=half, UNIT=ROW_UNIT,
        num_warps=WARPS, enable_fp_fusion=False,  # bitsandbytes rounds between the product and the sum
    )  # fmt: skip
    return out


def twin(packed: Packed, out: torch.Tensor, extra: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
    """The same in plain torch."""
    if extra is not None:
        extra[1].copy_(extra[0])
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], dim=-1).flatten().int()
    values = packed.code[nibbles].view(-1, BLOCK_SIZE) * maxima(packed)[:, None]
    return out.copy_(values.view(packed.shape))


def maxima(packed: Packed) -> torch.Tensor:
    """float32 [N K / 64]: what the codes of each block are multiplied by."""
    block = torch.arange(len(packed.absmax), device=packed.absmax.device)
    part = torch.bucketize(block, packed.starts, right=True) - 1
    scale = packed.scales[packed.scale_starts[part] + (block - packed.starts[part]) // NESTED_SIZE]
    return packed.absmax_code[packed.absmax.int()] * scale + packed.offsets[part]
