"""Output projection and cross entropy of the trained tokens, with the gradient made in the forward pass.

Logits exist for one chunk at a time and are turned into their own gradient in place; no product runs twice. Shapes: n
trained tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from unsloth_factory.kernels.cross_entropy import cross_entropy
from unsloth_factory.model.fast.linear import add_product

CHUNK_BYTES = 256 * 2**20
"""Logits of one chunk: 880 tokens of a vocabulary of 151,936 in 16 bit; fewer would read the weights more often."""
HALF_SCALE = 256.0
"""float16 holds numbers down to 6e-8: a gradient of softmax / 256 of that is still seen."""


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_bytes: int
    ) -> torch.Tensor:
        scale = HALF_SCALE if hidden.dtype == torch.float16 else 1.0
        size = max(1, chunk_bytes // (hidden.element_size() * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        wants = ctx.needs_input_grad[0]
        dhidden = torch.empty_like(hidden) if wants else None
        trains = ctx.needs_input_grad[1]
        dweight = torch.zeros_like(weight, dtype=torch.float32) if trains else None
        weight = weight.to(hidden.dtype)
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            logits = hidden[part] @ weight.t()
            total += cross_entropy(logits, targets[part], gradient_scale=scale if wants else None).sum()
            if dhidden is not None:
                torch.mm(logits, weight, out=dhidden[part])
            if dweight is not None:
                add_product(dweight, logits.t(), hidden[part], 1.0)
            del logits  # or those of the next chunk lie beside them: 256 MB
        ctx.dhidden, ctx.dweight, ctx.scale = dhidden, dweight, scale
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None, None]:
        dhidden, dweight = ctx.dhidden, ctx.dweight
        assert dhidden is not None, "a second backward pass: the gradient is gone"
        ctx.dhidden = ctx.dweight = None
        factor = gradients[0] / ctx.scale
        return dhidden.mul_(factor), None if dweight is None else dweight.mul_(factor), None, None


def cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Sum of the cross entropy of all rows, float32 scalar, differentiable with respect to `hidden` once.

    Args:
        hidden: [n, h] in the computation dtype.
        weight: [V, h]; float32 where it trains, which takes as much memory once more for its gradient.
        targets: int64 [n].
        chunk_bytes: Logits that are held at a time.
    """
    return _HeadLoss.apply(hidden, weight, targets, chunk_bytes)
