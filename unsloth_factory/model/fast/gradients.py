"""Where the gradients of all LoRA matrices add up: one flat float32 tensor, of which every `.grad` is a part.

One memset begins a step, addresses never change (a CUDA graph needs that), and the products that make the gradients add
them up themselves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from unsloth_factory.model.fast.linear import FusedLinear


class Gradients:
    """The gradients of some projections' LoRA matrices."""

    def __init__(self, projections: Sequence[FusedLinear], device: torch.device) -> None:
        adapted = [fused for fused in projections if fused.rank]
        sizes = [size for fused in adapted for size in fused.gradient_sizes]
        self._flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        places = iter(self._flat.split(sizes) if sizes else ())
        self._views: list[tuple[nn.Parameter, torch.Tensor]] = []
        for fused in adapted:
            self._views += fused.collect_in([next(places) for _ in fused.gradient_sizes])

    def prepare(self) -> None:
        """Before a backward pass: what `.grad` holds is kept, and what it does not hold begins at 0."""
        if not self._views or all(parameter.grad is view for parameter, view in self._views):
            return
        fresh = all(parameter.grad is None for parameter, _ in self._views)
        if fresh:
            self._flat.zero_()
        for parameter, view in self._views:
            if parameter.grad is None and not fresh:
                view.zero_()
            elif parameter.grad is not None and parameter.grad is not view:
                view.copy_(parameter.grad)
            parameter.grad = view

    def snapshot(self) -> torch.Tensor:
        """A copy of everything added up so far."""
        return self._flat.clone()

    def restore(self, kept: torch.Tensor) -> None:
        """Go back to a snapshot."""
        self._flat.copy_(kept)
