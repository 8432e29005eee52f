"""Frozen projections that share their input, stored as one matrix, each with its own LoRA pair.

    y = x W^T + b,   y[:, part] += s (x A_part^T) B_part^T

and backwards, by hand: what is saved is x (by the caller) and t = x A^T, a few numbers a token. Shapes: T tokens, K
inputs, N outputs of all parts together, r the sum of the parts' ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unsloth_factory.kernels import nf4


@dataclass(frozen=True)
class Part:
    """One of the projections: its name in the checkpoint and the rows it takes."""

    name: str
    start: int
    stop: int


@dataclass
class LoraPair:
    """float32 A [r, K] and B [rows, r] of one part; trained ones collect their gradient in `.grad`."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    """alpha / r"""


class FusedLinear:
    """The projections of one input. Not a module: its parameters are registered by the decoder, under PEFT's names.

    Args:
        weight: NF4, or [N, K] in the computation dtype.
        bias: [N] in the computation dtype, or None.
        parts: The projections, from row 0 on.
        dtype: Computation dtype.
    """

    def __init__(
        self, weight: nf4.Packed | torch.Tensor, bias: torch.Tensor | None, parts: Sequence[Part], dtype: torch.dtype
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.parts = tuple(parts)
        self.dtype = dtype
        self.pairs: dict[str, LoraPair] = {}
        self._a: torch.Tensor | None = None
        """All A of the parts that have one, [r, K], in the computation dtype."""
        self._b: dict[str, torch.Tensor] = {}
        self._columns: dict[str, slice] = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        return self.weight.shape[0], self.weight.shape[1]

    def attach(self, pairs: dict[str, LoraPair]) -> None:
        """Take the LoRA pairs of some parts, by their names."""
        self.pairs = pairs
        start = 0
        for part in self.parts:
            if part.name in pairs:
                rank = pairs[part.name].a.shape[0]
                self._columns[part.name] = slice(start, start + rank)
                self._b[part.name] = torch.empty_like(pairs[part.name].b, dtype=self.dtype, requires_grad=False)
                start += rank
        device = self.weight.codes.device if isinstance(self.weight, nf4.Packed) else self.weight.device
        self._a = torch.empty(start, self.shape[1], dtype=self.dtype, device=device) if start else None

    def shadows(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(16-bit copy, float32 original) of every LoRA matrix; the decoder refreshes all of them in one call."""
        pairs = []
        for name, pair in self.pairs.items():
            assert self._a is not None
            pairs.append((self._a[self._columns[name]], pair.a))
            pairs.append((self._b[name], pair.b))
        return pairs

    def matrix(self) -> torch.Tensor:
        """W [N, K] in the computation dtype; made anew from NF4, so drop it as soon as it has been used."""
        return nf4.dequantize(self.weight, self.dtype) if isinstance(self.weight, nf4.Packed) else self.weight

    def forward(
        self, x: torch.Tensor, *, lora: bool = True, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(y [T, N], t [T, r] or None).

        Args:
            x: [T, K]
            lora: False leaves the adapter out.
            residual: [T, N], added to y; for projections without a bias.
        """
        added = residual if residual is not None else self.bias
        y = x @ self.matrix().t() if added is None else torch.addmm(added, x, self.matrix().t())
        if self._a is None or not lora:
            return y, None
        t = x @ self._a.t()
        for part, pair in self._trained():
            y[:, part.start : part.stop].addmm_(t[:, self._columns[part.name]], self._b[part.name].t(), alpha=pair.scale)
        return y, t

    def down(self, x: torch.Tensor) -> torch.Tensor | None:
        """t [T, r] alone, where y is not needed again."""
        return None if self._a is None else x @ self._a.t()

    def input_gradient(self, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(dx [T, K], dt [T, r] or None) of dy [T, N]."""
        dx = dy @ self.matrix()
        if self._a is None:
            return dx, None
        dt = dy.new_empty(dy.shape[0], self._a.shape[0])
        for part, pair in self._trained():
            torch.mul(dy[:, part.start : part.stop] @ self._b[part.name], pair.scale, out=dt[:, self._columns[part.name]])
        return dx.addmm_(dt, self._a), dt

    def add_gradients(
        self, dy: torch.Tensor, x: torch.Tensor, t: torch.Tensor | None, dt: torch.Tensor | None
    ) -> None:
        """Add this micro-batch's gradients of A and B to their `.grad`, in float32."""
        if t is None or dt is None:
            return
        da = dt.t() @ x  # [r, K]
        for part, pair in self._trained():
            columns = self._columns[part.name]
            _add(pair.a, da[columns], 1.0)
            _add(pair.b, dy[:, part.start : part.stop].t() @ t[:, columns], pair.scale)

    def _trained(self) -> list[tuple[Part, LoraPair]]:
        return [(part, self.pairs[part.name]) for part in self.parts if part.name in self.pairs]


def _add(parameter: nn.Parameter, gradient: torch.Tensor, scale: float) -> None:
    if not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient.float() * scale if scale != 1.0 else gradient.float()
        return
    parameter.grad.add_(gradient, alpha=scale)
