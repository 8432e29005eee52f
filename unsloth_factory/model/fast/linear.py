"""Frozen projections that share their input, stored as one matrix, each with its own LoRA pair.

    y = x W^T + b,   y[:, part] += s (x A_part^T) B_part^T

The adapter costs next to no arithmetic but, done by itself, many passes over x and y. So it rides in the base product:
with t = x A^T written behind x, and s B (block-diagonal over the parts) behind the rows of W,

    y = [x t] [W sB]^T        and backwards        dx = [dy dt] [W; A],   dt = dy sB

which are one product each, longer by the sum of the ranks: 5 ms less of 128 for a micro-batch of 2,048 tokens of
Qwen3-8B on an H200. Shapes: T tokens, K inputs, N outputs of all parts together, R the
sum of the parts' ranks, rounded up to 8 for aligned rows.

With LoRA dropout each part sees an x of its own, so A cannot ride: t = drop(x) A^T and dx += drop(dt A) are then done
part by part, with masks that are computed again wherever they are needed. Nor can it where the base product is one of
8-bit numbers, which is not exact: the adapter's own products stay in 16 bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from unsloth_factory.kernels import float8, nf4, nf4_float8
from unsloth_factory.kernels.dropout import add_dropout, dropout
from unsloth_factory.kernels.launch import runs_kernels
from unsloth_factory.kernels.shadows import Shadow
from unsloth_factory.model.fast.arena import Arena

ALIGNED = 8
"""Numbers: 16 bytes of 16-bit ones, what the matrix units read at once."""


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
    dropout: float = 0.0
    """Share of the input's numbers that are left out while training."""


@dataclass(frozen=True)
class Trained:
    """Weights of one part that train themselves, float32 parts of the fused matrix, with gradients in their `.grad`."""

    part: Part
    weight: nn.Parameter
    """[rows, K]"""
    bias: nn.Parameter | None
    """[rows]"""


class FusedLinear:
    """The projections of one input. Not a module: its parameters are registered by the model, under PEFT's names.

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
        self.device = weight.codes.device if isinstance(weight, nf4.Packed) else weight.device
        self.outputs, self.inputs = weight.shape[0], weight.shape[1]
        self.rank = 0
        """R: 0 without an adapter."""
        self.stream = 0
        """Of dropout's random numbers: those of the first part; each has its own."""
        self.pairs: dict[str, LoraPair] = {}
        self._columns: dict[str, slice] = {}
        self._a = self._b = torch.empty(0)
        self._a_gradient = torch.empty(0)
        self._b_gradients: dict[str, torch.Tensor] = {}
        self.trained: tuple[Trained, ...] = ()
        """Of full and freeze fine-tuning."""
        self.float8: tuple[nf4.Packed, float] | None = None
        """What `nf4_float8.scaled` made: products with the weights are computed in float8; None: in `dtype`."""

    def train(self, dtype: torch.dtype) -> tuple[Trained, ...]:
        """Let the weights themselves train, in float32; products are still computed in `dtype`."""
        assert isinstance(self.weight, torch.Tensor), "4-bit weights cannot train themselves"
        self.weight, self.dtype = self.weight.float(), dtype
        self.bias = None if self.bias is None else self.bias.float()
        rows = [(part, slice(part.start, part.stop)) for part in self.parts]
        self.trained = tuple(
            Trained(part, nn.Parameter(self.weight[own]), None if self.bias is None else nn.Parameter(self.bias[own]))
            for part, own in rows
        )
        return self.trained

    def compute_in_float8(self) -> None:
        """Products with the weights, forwards and backwards, are computed in float8 from now on."""
        assert isinstance(self.weight, nf4.Packed), "4-bit weights alone"
        self.float8 = nf4_float8.scaled(self.weight)

    def attach(self, pairs: dict[str, LoraPair]) -> list[Shadow]:
        """Take the LoRA pairs of some parts, by their names; returns the copies that must be fresh before a pass."""
        self.pairs = pairs
        start = 0
        for part in self.parts:
            if part.name in pairs:
                stop = start + pairs[part.name].a.shape[0]
                self._columns[part.name] = slice(start, stop)
                start = stop
        self.rank = -(-start // ALIGNED) * ALIGNED
        self._a = torch.zeros(self.rank, self.inputs, dtype=self.dtype, device=self.device)
        self._b = torch.zeros(self.outputs, self.rank, dtype=self.dtype, device=self.device)
        shadows = []
        for part, pair in self._trained():
            columns = self._columns[part.name]
            shadows.append(Shadow(self._a[columns], pair.a, 1.0))
            shadows.append(Shadow(self._b[part.start : part.stop, columns], pair.b, pair.scale))
        return shadows

    @property
    def flat_sizes(self) -> list[int]:
        """Numbers of A (all parts together, rounded up as R is) and of each B."""
        return [self.rank * self.inputs, *(pair.b.numel() for _, pair in self._trained())]

    def matrices(self, places: Sequence[torch.Tensor]) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """(LoRA matrix, its part of flat places of `flat_sizes`) of all parts."""
        views = []
        a = places[0].view(self.rank, self.inputs)
        for place, (part, pair) in zip(places[1:], self._trained(), strict=True):
            views.append((pair.a, a[self._columns[part.name]]))
            views.append((pair.b, place.view(pair.b.shape)))
        return views

    def collect_in(self, places: Sequence[torch.Tensor]) -> None:
        """Add gradients up in these flat places of `flat_sizes`."""
        self._a_gradient = places[0].view(self.rank, self.inputs)
        for place, (part, pair) in zip(places[1:], self._trained(), strict=True):
            self._b_gradients[part.name] = place.view(pair.b.shape)

    def gradients(self) -> list[torch.Tensor]:
        """Where gradients are added up: of A of all parts, and of each B; or of trained weights and biases."""
        own = [parameter for one in self.trained for parameter in (one.weight, one.bias)]
        adapter = [self._a_gradient, *self._b_gradients.values()] if self._b_gradients else []
        return adapter + [one.grad for one in own if one is not None and one.grad is not None]

    def clear_gradients(self) -> None:
        """Set them to 0."""
        for gradient in self.gradients():
            gradient.zero_()

    def input(self, tokens: int, arena: Arena | None = None) -> torch.Tensor:
        """Room [T, K + R] for an input, in the arena if there is one; write x into its first K columns (`x_of`)."""
        return self._room(tokens, self.inputs + self.rank, arena)

    def x_of(self, wide: torch.Tensor) -> torch.Tensor:
        """The x [T, K] of such a room."""
        return wide[:, : self.inputs]

    def t_of(self, wide: torch.Tensor) -> torch.Tensor | None:
        """The t = x A^T [T, R] that `forward` has left in an input; None without an adapter."""
        return wide[:, self.inputs :] if self.rank else None

    def output(self, tokens: int, arena: Arena | None = None) -> torch.Tensor:
        """Room [T, N + R] for an output or its gradient; write it into the first N columns (`y_of`)."""
        return self._room(tokens, self.outputs + self.rank, arena)

    def _room(self, tokens: int, columns: int, arena: Arena | None) -> torch.Tensor:
        if arena is not None:
            return arena.take(tokens, columns)
        return torch.empty(tokens, columns, dtype=self.dtype, device=self.device)

    def y_of(self, wide: torch.Tensor) -> torch.Tensor:
        """The y or dy [T, N] of such a room."""
        return wide[:, : self.outputs]

    def forward(
        self,
        wide: torch.Tensor,
        *,
        lora: bool = True,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Y [T, N]; with an adapter t is left in `wide` (`t_of`).

        Args:
            wide: `input`, its x filled in; its other columns are written.
            lora: False leaves the adapter out.
            residual: [T, N], added to y; for projections without a bias.
            out: Where y is written.
            seed: int64 [1] of LoRA dropout; None: nothing is dropped.
        """
        bias = self.bias if self.bias is None else self.bias.to(self.dtype)
        added = residual if residual is not None else bias
        if not (lora and self.rank):
            return self._base(self.x_of(wide), added, out)
        t = wide[:, self.inputs :]
        if seed is None:
            torch.mm(self.x_of(wide), self._a.t(), out=t)
        else:
            t.zero_()  # the columns that round the ranks up
            for part, pair in self._trained():
                columns = self._columns[part.name]
                torch.mm(self._dropped(self.x_of(wide), part, pair, seed), self._a[columns].t(), out=t[:, columns])
        if self._rides:
            matrix = self._wide_matrix(self.outputs, self.inputs + self.rank, self._b)
            return _product(wide, matrix.t(), added, out)
        return self._base(self.x_of(wide), added, out).addmm_(t, self._b.t())

    def adapter_gradient(self, wide: torch.Tensor) -> None:
        """From `output`, its dy filled in: write dt behind dy for `add_gradients`."""
        if self.rank:
            torch.mm(self.y_of(wide), self._b, out=wide[:, self.outputs :])

    def input_gradient(self, wide: torch.Tensor, seed: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient at x [T, K] from `output`, its dy filled in; does what `adapter_gradient` does, too."""
        self.adapter_gradient(wide)
        if self._rides and self.rank and seed is None:
            return wide @ self._wide_matrix(self.outputs + self.rank, self.inputs, self._a)
        dx = self._base_gradient(self.y_of(wide))
        if not self.rank:
            return dx
        dt = wide[:, self.outputs :]
        if seed is None:
            return dx.addmm_(dt, self._a)
        for part, pair in self._trained():
            columns = self._columns[part.name]
            add_dropout(dx, dt[:, columns] @ self._a[columns], pair.dropout, seed, self._stream(part))
        return dx

    @property
    def _rides(self) -> bool:
        """The adapter's second product is part of the base product."""
        return isinstance(self.weight, nf4.Packed) and self.float8 is None

    def _base(self, x: torch.Tensor, added: torch.Tensor | None, out: torch.Tensor | None) -> torch.Tensor:
        """X W^T + added [T, N], without the adapter."""
        if self.float8 is None:
            return _product(x, self._matrix().t(), added, out)
        y = self._in_float8(x, transposed=False)
        if added is None:
            return y if out is None else out.copy_(y)
        return torch.add(y, added, out=y if out is None else out)

    def _base_gradient(self, dy: torch.Tensor) -> torch.Tensor:
        """Dy W [T, K], without the adapter."""
        return dy @ self._matrix() if self.float8 is None else self._in_float8(dy, transposed=True)

    def _in_float8(self, rows: torch.Tensor, *, transposed: bool) -> torch.Tensor:
        assert self.float8 is not None
        packed, factor = self.float8
        quantized, scales = float8.quantize_rows(rows)
        matrix = nf4_float8.dequantize(packed, transposed=transposed)
        return float8.product(quantized, scales, matrix, factor, self.dtype)

    def add_gradients(
        self, wide: torch.Tensor, x: torch.Tensor, t: torch.Tensor | None, seed: torch.Tensor | None = None
    ) -> None:
        """Add this micro-batch's gradients up, float32: of A and B in the places of `collect_in`, or of the weights.

        Args:
            wide: `output` after `input_gradient`.
            x: [T, K]
            t: [T, R] of the forward pass.
            seed: Of the forward pass.
        """
        for one in self.trained:
            dy = wide[:, one.part.start : one.part.stop]
            assert one.weight.grad is not None
            add_product(one.weight.grad, dy.t(), x, 1.0)
            if one.bias is not None and one.bias.grad is not None:
                one.bias.grad += dy.float().sum(0)
        if t is None or not self._b_gradients:  # no adapter, or one that answers and does not train
            return
        dt = wide[:, self.outputs :]
        if seed is None:
            add_product(self._a_gradient, dt.t(), x, 1.0)
        for part, pair in self._trained():
            if seed is not None:
                columns = self._columns[part.name]
                add_product(self._a_gradient[columns], dt[:, columns].t(), self._dropped(x, part, pair, seed), 1.0)
            dy = wide[:, part.start : part.stop]
            add_product(self._b_gradients[part.name], dy.t(), t[:, self._columns[part.name]], pair.scale)

    def _dropped(self, x: torch.Tensor, part: Part, pair: LoraPair, seed: torch.Tensor) -> torch.Tensor:
        """The x [T, K] that the adapter of a part sees."""
        return dropout(x, pair.dropout, seed, self._stream(part))

    def _stream(self, part: Part) -> int:
        return self.stream + self.parts.index(part)

    def _matrix(self) -> torch.Tensor:
        """W [N, K] in the computation dtype; made anew from NF4 or float32: drop it as soon as it has been used."""
        if isinstance(self.weight, nf4.Packed):
            return nf4.dequantize(self.weight, self.dtype)
        return self.weight.to(self.dtype)

    def _wide_matrix(self, rows: int, columns: int, extra: torch.Tensor) -> torch.Tensor:
        """[rows, columns] with W in its upper left corner and `extra` beside or below it."""
        assert isinstance(self.weight, nf4.Packed)
        matrix = torch.empty(rows, columns, dtype=self.dtype, device=self.device)
        place = matrix[self.outputs :] if rows > self.outputs else matrix[:, self.inputs :]
        nf4.dequantize(self.weight, self.dtype, matrix[: self.outputs, : self.inputs], (extra, place))
        return matrix

    def _trained(self) -> list[tuple[Part, LoraPair]]:
        return [(part, self.pairs[part.name]) for part in self.parts if part.name in self.pairs]


def _product(
    x: torch.Tensor, matrix: torch.Tensor, added: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    if added is None:
        return torch.mm(x, matrix) if out is None else torch.mm(x, matrix, out=out)
    return torch.addmm(added, x, matrix) if out is None else torch.addmm(added, x, matrix, out=out)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """Add scale * left @ right to the float32 `total`; on a GPU the product of 16-bit factors itself adds up in it."""
    if runs_kernels(left.device) and left.dtype != torch.float32:
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, beta=1, alpha=scale, out=total)
    else:
        total.add_((left @ right).float(), alpha=scale)
