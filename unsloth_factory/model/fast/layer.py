"""One decoder layer, forwards and backwards, with an explicit choice of what is kept in between.

    a = attention(rotate(norm(x) W_qkv));  m = x + a W_o;  y = m + swiglu(norm(m) W_gu) W_d

What every choice recomputes is cheap arithmetic without products: norms, head norms, rotation, SwiGLU. Saved numbers a
token, 2 bytes each, for Qwen3-8B: KEEP 43 k (86 KB), DROP_GATE_UP 18.6 k, RECOMPUTE 4 k, OFFLOAD none on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import torch

from unsloth_factory.kernels import attention, rms_norm, rotary, swiglu
from unsloth_factory.kernels.attention import Attended, Documents
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.linear import FusedLinear
from unsloth_factory.model.fast.offload import Away
from unsloth_factory.model.fast.spec import DecoderSpec

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""At the queries, keys and values of a layer's attention."""


class Saving(Enum):
    """What a layer keeps of its forward pass."""

    KEEP = "keep"
    """Everything that a product has made."""
    DROP_GATE_UP = "drop_gate_up"
    """All but the widest: the gate-up product, half of the layer's arithmetic, runs once more."""
    RECOMPUTE = "recompute"
    """The layer's input alone; all products but the last run once more."""
    OFFLOAD = "offload"
    """The same, and the input waits in the CPU's memory. Not for CUDA graphs, whose passes copy nothing out."""


@dataclass(frozen=True)
class Row:
    """What all layers share: the positions and the documents of the packed row."""

    cos: torch.Tensor
    """float32 [T, D/2]"""
    sin: torch.Tensor
    documents: Documents
    arena: Arena | None = None
    """Where what is kept lies; None: in memory of its own."""
    seed: torch.Tensor | None = None
    """int64 [1] of this micro-batch's LoRA dropout; None: nothing is dropped."""


@dataclass
class Saved:
    """The tensors a layer keeps; None where they are recomputed."""

    x: torch.Tensor
    """[T, h] input; empty while it is away"""
    away: Away | None = None
    """Where the input is instead."""
    qkv: torch.Tensor | None = None
    attended: Attended | None = None
    wide: torch.Tensor | None = None
    """`out.input`: what was attended to, and its t"""
    middle: torch.Tensor | None = None
    """[T, h] after attention and its residual"""
    gate_up: torch.Tensor | None = None
    t: dict[str, torch.Tensor | None] = field(default_factory=dict)
    """x A^T of the fused projections "qkv", "gate_up", "down"."""


@dataclass
class Norms:
    """The weights of a layer's norms."""

    attention: torch.Tensor
    mlp: torch.Tensor
    head: rotary.HeadNorm | None


class Layer:
    """One layer's frozen weights and its arithmetic."""

    def __init__(
        self, spec: DecoderSpec, norms: Norms, qkv: FusedLinear, out: FusedLinear, gate_up: FusedLinear,
        down: FusedLinear,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.norms = norms
        self.qkv, self.out, self.gate_up, self.down = qkv, out, gate_up, down

    @property
    def projections(self) -> dict[str, FusedLinear]:
        """The four fused projections by name."""
        return {"qkv": self.qkv, "out": self.out, "gate_up": self.gate_up, "down": self.down}

    def forward(
        self, x: torch.Tensor, row: Row, *, saving: Saving | None, lora: bool = True
    ) -> tuple[torch.Tensor, Saved | None]:
        """(y [T, h], what the backward pass needs); saving None keeps nothing."""
        saved = None if saving is None else Saved(x)
        inside = saved if saving in (Saving.KEEP, Saving.DROP_GATE_UP) else None
        wide = self.attend(x, row, inside, lora=lora, arena=None if inside is None else row.arena)
        arena = None if saving is None else row.arena
        y = self.finish(x, wide, saved, saving=saving, lora=lora, arena=arena, seed=row.seed)
        return y, saved

    def attend(
        self, x: torch.Tensor, row: Row, saved: Saved | None, *, lora: bool = True, arena: Arena | None = None
    ) -> torch.Tensor:
        """The layer up to its attention: `out.input` [T, Hq D + R], filled.

        Args:
            x: [T, h]
            row: Of the micro-batch.
            saved: Filled; None where what happens inside is not kept.
            lora: False leaves the adapter out.
            arena: Where what is kept lies; None: in memory of its own.
        """
        heads = self.spec.heads
        normed = self.normed(x, self.norms.attention, self.qkv)
        room = self.qkv.y_of(self.qkv.output(len(x), arena))
        qkv = self.qkv.forward(normed, lora=lora, out=room, seed=row.seed)
        q, k = rotary.rotary(qkv, row.cos, row.sin, heads, self.norms.head)
        wide = self.out.input(len(x), arena)
        place = self.out.x_of(wide).unflatten(1, (heads.queries, heads.size))
        attended = attention.attention(q, k, rotary.split(qkv, heads)[2], row.documents, place)
        if saved is not None:
            saved.qkv, saved.attended = qkv, attended
            saved.t["qkv"] = _copy(self.qkv.t_of(normed))
        return wide

    def finish(
        self,
        x: torch.Tensor,
        wide: torch.Tensor,
        saved: Saved | None,
        *,
        saving: Saving | None,
        lora: bool = True,
        arena: Arena | None = None,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The rest of the layer, which computes row by row: y [n, h].

        Args:
            x: [n, h] rows of the layer's input.
            wide: The same rows of what `attend` made.
            saved: Filled; None where nothing is kept.
            saving: What of it.
            lora: As for `attend`.
            arena: Where what is kept lies, the output too; None: in memory of its own.
            seed: Of LoRA dropout.
        """
        inside = saving in (Saving.KEEP, Saving.DROP_GATE_UP)
        middle = self._middle(x, wide, lora, arena if inside else None, seed)
        normed = self.normed(middle, self.norms.mlp, self.gate_up)
        room = self.gate_up.output(len(x), arena if saving is Saving.KEEP else None)
        gate_up = self.gate_up.forward(normed, lora=lora, out=self.gate_up.y_of(room), seed=seed)
        t = _copy(self.gate_up.t_of(normed)) if saving is Saving.KEEP else None  # or it is computed again
        del normed
        activated = self._activated(gate_up)
        out = arena.take(*x.shape) if arena is not None else None
        y = self.down.forward(activated, lora=lora, residual=middle, out=out, seed=seed)
        if saved is None:
            return y
        saved.t |= {"gate_up": t, "down": _copy(self.down.t_of(activated))}
        if inside:
            saved.wide, saved.middle = wide, middle
        if saving is Saving.KEEP:
            saved.gate_up = gate_up
        return y

    def _middle(
        self, x: torch.Tensor, wide: torch.Tensor, lora: bool, arena: Arena | None, seed: torch.Tensor | None
    ) -> torch.Tensor:
        """[n, h] after attention and its residual."""
        out = arena.take(*x.shape) if arena is not None else None
        return self.out.forward(wide, lora=lora, residual=x, out=out, seed=seed)

    def normed(self, x: torch.Tensor, weight: torch.Tensor, taker: FusedLinear) -> torch.Tensor:
        """The norm of x, as the input of a projection."""
        wide = taker.input(len(x))
        rms_norm.rms_norm(x, weight, self.spec.eps, taker.x_of(wide))
        return wide

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor, lora: bool) -> torch.Tensor:
        """Output [T, h] from the layer's input and its attention's output [T, Hq D]; nothing is kept."""
        wide = self.out.input(len(x))
        self.out.x_of(wide).copy_(attended)
        middle = self.out.forward(wide, lora=lora, residual=x)
        gate_up = self.gate_up.forward(self.normed(middle, self.norms.mlp, self.gate_up), lora=lora)
        return self.down.forward(self._activated(gate_up), lora=lora, residual=middle)

    def _activated(self, gate_up: torch.Tensor) -> torch.Tensor:
        wide = self.down.input(len(gate_up))
        swiglu.swiglu(gate_up, self.down.x_of(wide))
        return wide

    def backward(self, dy: torch.Tensor, saved: Saved, row: Row, below: FusedLinear | None) -> torch.Tensor | None:
        """Gradient at the layer's input; LoRA gradients are added up in the parameters. `saved` is used up.

        Args:
            dy: `down.output` with the gradient at the layer's output in its first h columns.
            saved: Of the forward pass.
            row: As there.
            below: The projection whose output the layer's input is: the gradient comes in its `output`. None: there is
                nothing below that wants one.
        """
        if saved.qkv is None:
            saved.wide = self.attend(saved.x, row, saved)
            saved.middle = self._middle(saved.x, saved.wide, True, None, row.seed)
        dattended, dmiddle = self.finish_backward(dy, saved, row.seed)
        return self.attend_backward(dattended, self.out.y_of(dmiddle), saved, row, below)

    def finish_backward(
        self, dy: torch.Tensor, saved: Saved, seed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient at what was attended to [n, Hq D], gradient at the layer's input beside it in `out.output`)."""
        dmiddle = self._mlp_backward(dy, saved, seed)
        wide, saved.middle, saved.wide = saved.wide, None, None
        assert wide is not None
        dattended = self.out.input_gradient(dmiddle, seed)
        self.out.add_gradients(dmiddle, self.out.x_of(wide), self.out.t_of(wide), seed)
        return dattended, dmiddle

    def _mlp_backward(self, dy: torch.Tensor, saved: Saved, seed: torch.Tensor | None) -> torch.Tensor:
        """Gradient at the residual between attention and MLP, in `out.output`."""
        assert saved.middle is not None
        normed = self.normed(saved.middle, self.norms.mlp, self.gate_up)
        gate_up, t = saved.gate_up, saved.t["gate_up"]
        if gate_up is None:
            room = self.gate_up.y_of(self.gate_up.output(len(normed)))
            gate_up = self.gate_up.forward(normed, out=room, seed=seed)
            t = self.gate_up.t_of(normed)
        saved.gate_up = None
        dh = self.down.input_gradient(dy, seed)
        h = swiglu.swiglu_backward(dh, gate_up)  # in dh's memory
        del dh
        self.down.add_gradients(dy, h, saved.t["down"], seed)
        del h
        dgate_up = _room(gate_up, self.gate_up)
        dnormed = self.gate_up.input_gradient(dgate_up, seed)
        self.gate_up.add_gradients(dgate_up, self.gate_up.x_of(normed), t, seed)
        del gate_up, dgate_up, normed, t
        add_norm_gradient(self.norms.mlp, dnormed, saved.middle, self.spec.eps)
        dmiddle = self.out.output(len(dy))
        rms_norm.rms_norm_backward(
            dnormed, saved.middle, self.norms.mlp, self.spec.eps,
            residual=self.down.y_of(dy), out=self.out.y_of(dmiddle),
        )  # fmt: skip
        return dmiddle

    def attend_backward(
        self, dattended: torch.Tensor, residual: torch.Tensor, saved: Saved, row: Row, below: FusedLinear | None
    ) -> torch.Tensor | None:
        """Gradient at the layer's input, in `below.output`.

        Args:
            dattended: Gradient at what was attended to, [T, Hq D].
            residual: Gradient at the layer's input past its attention, [T, h].
            saved: Of `attend`; used up.
            row: As there.
            below: As for `backward`.
        """
        assert saved.qkv is not None
        assert saved.attended is not None
        heads = self.spec.heads
        q, k = rotary.rotary(saved.qkv, row.cos, row.sin, heads, self.norms.head)
        v = rotary.split(saved.qkv, heads)[2]
        gradients = attention.attention_backward(dattended.view(q.shape), q, k, v, saved.attended, row.documents)
        del q, k, v, dattended
        saved.attended = None
        self._add_head_norm_gradients(gradients, saved.qkv, row)
        rotary.rotary_backward(gradients, saved.qkv, row.cos, row.sin, heads, self.norms.head)
        del gradients
        dqkv = _room(saved.qkv, self.qkv)
        saved.qkv = None
        normed = rms_norm.rms_norm(saved.x, self.norms.attention, self.spec.eps)
        if below is None and not self.norms.attention.requires_grad:
            self.qkv.adapter_gradient(dqkv)
            self.qkv.add_gradients(dqkv, normed, saved.t["qkv"], row.seed)
            return None
        dnormed = self.qkv.input_gradient(dqkv, row.seed)
        self.qkv.add_gradients(dqkv, normed, saved.t["qkv"], row.seed)
        add_norm_gradient(self.norms.attention, dnormed, saved.x, self.spec.eps)
        if below is None:
            return None
        dx = below.output(len(normed))
        rms_norm.rms_norm_backward(
            dnormed, saved.x, self.norms.attention, self.spec.eps,
            residual=residual, out=below.y_of(dx),
        )  # fmt: skip
        return dx

    def _add_head_norm_gradients(self, gradients: Gradients, qkv: torch.Tensor, row: Row) -> None:
        norm = self.norms.head
        if norm is None or not norm.query_weight.requires_grad:
            return
        found = rotary.head_norm_gradients(gradients, qkv, row.cos, row.sin, self.spec.heads, norm)
        for weight, gradient in zip((norm.query_weight, norm.key_weight), found, strict=True):
            assert weight.grad is not None
            weight.grad += gradient


def add_norm_gradient(weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor, eps: float) -> None:
    """Add up the gradient of a norm's weight [h], if it trains, from the gradient dy [T, h] at the norm's output."""
    if weight.requires_grad:
        assert weight.grad is not None
        weight.grad += rms_norm.weight_gradient(dy, x, eps)


def _copy(t: torch.Tensor | None) -> torch.Tensor | None:
    """A small tensor of its own, so that the input that it lies in can go."""
    return None if t is None else t.clone()


def _room(y: torch.Tensor, maker: FusedLinear) -> torch.Tensor:
    """The `output` [T, N + R] whose y [T, N] this is."""
    return y.as_strided((len(y), maker.outputs + maker.rank), y.stride(), y.storage_offset())
