"""All LoRA matrices and their gradients in a few long tensors, of which each matrix is a part.

The optimizer then sees a handful of parameters instead of 504: AdamW 8 bit hands each of them to the GPU by itself, and
clipping, undoing and zeroing do the same. One memset begins a step; addresses never change, which CUDA graphs need; and
the products that make the gradients add them up themselves. Blocks of 256 numbers of the 8-bit optimizer end where
matrices end, as long as rank x rows is a multiple of 256.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unsloth_factory.model.fast.linear import FusedLinear

LONGEST = 2**23
"""Numbers of one long tensor, about: an update can be undone tensor by tensor, which takes that memory twice."""


@dataclass
class Place:
    """Where one matrix lies."""

    parameter: nn.Parameter
    value: torch.Tensor
    gradient: torch.Tensor


class FlatAdapter:
    """The LoRA matrices of some projections, moved into long tensors.

    Args:
        projections: With their pairs attached; those without are left out.
        device: Of the matrices.
    """

    def __init__(self, projections: Sequence[FusedLinear], device: torch.device) -> None:
        self.parameters: list[nn.Parameter] = []
        """The long tensors, [n, 1]: two dimensions, because weight decay is for matrices."""
        self._gradients: list[torch.Tensor] = []
        self._places: list[Place] = []
        for group in _groups([fused for fused in projections if fused.rank]):
            self._add(group, device)

    def _add(self, group: list[FusedLinear], device: torch.device) -> None:
        sizes = [size for fused in group for size in fused.flat_sizes]
        values, gradients = torch.zeros(2, sum(sizes), dtype=torch.float32, device=device)
        self.parameters.append(nn.Parameter(values.view(-1, 1)))
        self._gradients.append(gradients.view(-1, 1))
        value_parts, gradient_parts = iter(values.split(sizes)), iter(gradients.split(sizes))
        for fused in group:
            value_places = [next(value_parts) for _ in fused.flat_sizes]
            gradient_places = [next(gradient_parts) for _ in fused.flat_sizes]
            fused.collect_in(gradient_places)
            matrices = zip(fused.matrices(value_places), fused.matrices(gradient_places), strict=True)
            for (parameter, value), (_, gradient) in matrices:
                self._places.append(Place(parameter, value, gradient))
                _move(parameter, value)

    def prepare(self) -> None:
        """Before a backward pass: what gradients hold is kept, and what they do not hold begins at 0."""
        fresh = all(parameter.grad is None for parameter in self.parameters)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is None:
                gradient.zero_()
            elif parameter.grad is not gradient:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient
        for place in self._places:
            parameter = place.parameter
            if parameter.data_ptr() != place.value.data_ptr():  # somebody gave it other memory
                _move(parameter, place.value)
            if parameter.grad is None and not fresh:
                place.gradient.zero_()
            elif parameter.grad is not None and parameter.grad.data_ptr() != place.gradient.data_ptr():
                place.gradient.copy_(parameter.grad)
            parameter.grad = place.gradient

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of all gradients added up so far."""
        return [gradient.clone() for gradient in self._gradients]

    def restore(self, kept: list[torch.Tensor]) -> None:
        """Go back to a snapshot."""
        for gradient, old in zip(self._gradients, kept, strict=True):
            gradient.copy_(old)


def _move(parameter: nn.Parameter, place: torch.Tensor) -> None:
    place.copy_(parameter.detach())
    parameter.data = place


def _groups(projections: list[FusedLinear]) -> list[list[FusedLinear]]:
    groups: list[list[FusedLinear]] = []
    size = LONGEST
    for fused in projections:
        count = sum(fused.flat_sizes)
        if size + count > LONGEST:
            groups.append([])
            size = 0
        groups[-1].append(fused)
        size += count
    return groups
