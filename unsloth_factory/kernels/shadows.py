"""16-bit copies of many small float32 matrices, each times a factor, in one launch.

An 8B model with LoRA on all layers has 504 of them; one by one the launches alone would take 15 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from unsloth_factory.kernels.launch import jit, runs_triton, tl

BLOCK = 1024
"""Elements a program copies."""


@dataclass(frozen=True)
class Shadow:
    """One copy; `source` may change its storage between two refreshes."""

    copy: torch.Tensor
    """[rows, columns] in the computation dtype; rows may be parts of longer ones."""
    source: torch.nn.Parameter
    """float32 [rows, columns], contiguous"""
    factor: float


@jit
def _kernel(
    sources_ptr, copies_ptr, sizes_ptr, columns_ptr, strides_ptr, factors_ptr, owners_ptr, firsts_ptr, dtype_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    owner = tl.load(owners_ptr + program)
    source = tl.load(sources_ptr + owner).to(tl.pointer_type(tl.float32))
    copy = tl.load(copies_ptr + owner).to(tl.pointer_type(dtype_ptr.dtype.element_ty))
    columns = tl.load(columns_ptr + owner)
    place = (program - tl.load(firsts_ptr + owner)) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(sizes_ptr + owner)
    values = tl.load(source + place, mask=inside, other=0.0) * tl.load(factors_ptr + owner)
    row = place // columns
    target = copy + row * tl.load(strides_ptr + owner) + (place - row * columns)
    tl.store(target, values.to(dtype_ptr.dtype.element_ty), mask=inside)


class Shadows:
    """A set of copies that are refreshed together."""

    def __init__(self, shadows: Sequence[Shadow]) -> None:
        self.shadows = tuple(shadows)
        self._sources: list[int] = []
        self._tables: tuple[torch.Tensor, ...] = ()
        self._programs = 0

    def randomize(self, generator: torch.Generator) -> None:
        """Fill all copies with small normal numbers; the next refresh brings them back."""
        for shadow in self.shadows:
            shadow.copy.normal_(0.0, 0.02, generator=generator)

    def refresh(self) -> None:
        """Copy all."""
        if not self.shadows:
            return
        if runs_triton(self.shadows[0].copy):
            self._launch()
            return
        for shadow in self.shadows:
            shadow.copy.copy_(shadow.source.detach() * shadow.factor)

    def _launch(self) -> None:
        sources = [shadow.source.data_ptr() for shadow in self.shadows]
        if sources != self._sources:
            self._sources = sources
            self._build()
        _kernel[(self._programs,)](*self._tables, self.shadows[0].copy, BLOCK=BLOCK, num_warps=4)

    def _build(self) -> None:
        """Tables on the GPU; they hold as long as no source moves."""
        owners: list[int] = []
        firsts: list[int] = []
        for index, shadow in enumerate(self.shadows):
            assert shadow.source.is_contiguous()
            assert shadow.copy.stride(1) == 1
            firsts.append(len(owners))
            owners += [index] * -(-shadow.source.numel() // BLOCK)
        self._programs = len(owners)
        columns: list[tuple[Sequence[float], torch.dtype]] = [
            (self._sources, torch.int64),
            ([shadow.copy.data_ptr() for shadow in self.shadows], torch.int64),
            ([shadow.source.numel() for shadow in self.shadows], torch.int32),
            ([shadow.source.shape[1] for shadow in self.shadows], torch.int32),
            ([shadow.copy.stride(0) for shadow in self.shadows], torch.int32),
            ([shadow.factor for shadow in self.shadows], torch.float32),
            (owners, torch.int32),
            (firsts, torch.int32),
        ]
        device = self.shadows[0].copy.device
        self._tables = tuple(torch.tensor(values, dtype=dtype, device=device) for values, dtype in columns)
