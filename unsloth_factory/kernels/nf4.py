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
"""Packed bytes a program unpacks (2,048 weights, 32 maxima) with 2 warps: the fastest of twelve settings on an H200,
3.1 TB/s of reads and writes."""


@dataclass(frozen=True)
class Packed:
    """One or more matrices of K columns, quantised one by one and stacked to [N, K]."""

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
def _kernel(
    codes_ptr, absmax_ptr, scales_ptr, offsets_ptr, starts_ptr, scale_starts_ptr,
    code_ptr, absmax_code_ptr, out_ptr, total, columns, stride,
    PARTS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BYTES
    place = first + tl.arange(0, BYTES)
    inside = place < total
    packed = tl.load(codes_ptr + place, mask=inside, other=0).to(tl.int32)
    block = place // 32
    part_offset = tl.load(offsets_ptr)
    start = block * 0
    scale_start = block * 0
    offset = part_offset + 0.0 * block.to(tl.float32)
    for part in tl.static_range(1, PARTS):
        boundary = tl.load(starts_ptr + part)
        later = block >= boundary
        start = tl.where(later, boundary, start)
        scale_start = tl.where(later, tl.load(scale_starts_ptr + part), scale_start)
        offset = tl.where(later, tl.load(offsets_ptr + part), offset)
    maximum = tl.load(absmax_code_ptr + tl.load(absmax_ptr + block, mask=inside, other=0).to(tl.int32))
    scale = tl.load(scales_ptr + scale_start + (block - start) // 256, mask=inside, other=0.0)
    maximum = maximum * scale + offset
    high = tl.load(code_ptr + (packed >> 4)) * maximum
    low = tl.load(code_ptr + (packed & 15)) * maximum
    dtype = out_ptr.dtype.element_ty
    values = tl.interleave(high.to(dtype), low.to(dtype))
    element = 2 * first + tl.arange(0, 2 * BYTES)
    row = element // columns
    target = out_ptr + row * stride + (element - row * columns)
    tl.store(target, values, mask=element < 2 * total)


def dequantize(packed: Packed, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The weights [N, K] in `dtype`; written into `out`, whose rows may be longer than K, where it is given."""
    if out is None:
        out = torch.empty(packed.shape, dtype=dtype, device=packed.codes.device)
    return launch(packed, out) if runs_triton(packed.codes) else twin(packed, out)


def launch(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """The Triton kernel."""
    total = packed.codes.numel()
    _kernel[(-(-total // PROGRAM_BYTES),)](
        packed.codes, packed.absmax, packed.scales, packed.offsets, packed.starts, packed.scale_starts, packed.code,
        packed.absmax_code, out, total, packed.shape[1], out.stride(0),
        PARTS=len(packed.offsets), BYTES=PROGRAM_BYTES, num_warps=2,
        enable_fp_fusion=False,  # bitsandbytes rounds between the product and the sum
    )  # fmt: skip
    return out


def twin(packed: Packed, out: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    block = torch.arange(len(packed.absmax), device=packed.absmax.device)
    part = torch.bucketize(block, packed.starts, right=True) - 1
    scale = packed.scales[packed.scale_starts[part] + (block - packed.starts[part]) // NESTED_SIZE]
    maxima = packed.absmax_code[packed.absmax.int()] * scale + packed.offsets[part]
    nibbles = torch.stack([packed.codes >> 4, packed.codes & 15], dim=-1).flatten().int()
    values = packed.code[nibbles].view(-1, BLOCK_SIZE) * maxima[:, None]
    return out.copy_(values.view(packed.shape))
