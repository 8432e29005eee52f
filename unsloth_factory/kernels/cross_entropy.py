"""Cross entropy of a chunk of logits with its gradient, made in the forward pass and written over the logits.

loss = logsumexp(logits) - logits[target];  d loss / d logits = softmax(logits) - onehot(target).
Statistics are float32. Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import torch

from unsloth_factory.kernels.launch import jit, runs_triton, tl

BLOCK = 8192
"""Columns a program handles at once."""


@jit
def _kernel(
    logits_ptr, targets_ptr, loss_ptr, stride, scale,
    VOCABULARY: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    start = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    largest = -float("inf")
    total = 0.0
    for offset in range(0, VOCABULARY, BLOCK):
        columns = offset + tl.arange(0, BLOCK)
        values = tl.load(start + columns, mask=columns < VOCABULARY, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(values, axis=0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(values - higher), axis=0)
        largest = higher
    lse = largest + tl.log(total)
    tl.store(loss_ptr + row, lse - tl.load(start + target).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for offset in range(0, VOCABULARY, BLOCK):
            columns = offset + tl.arange(0, BLOCK)
            inside = columns < VOCABULARY
            values = tl.load(start + columns, mask=inside, other=-float("inf")).to(tl.float32)
            gradient = tl.exp(values - lse) - tl.where(columns == target, 1.0, 0.0)
            tl.store(start + columns, (gradient * scale).to(logits_ptr.dtype.element_ty), mask=inside)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor, *, gradient_scale: float | None) -> torch.Tensor:
    """Loss of each row, float32 [n].

    Args:
        logits: [n, V], rows contiguous; overwritten with the gradient times `gradient_scale`.
        targets: int64 [n].
        gradient_scale: Keeps small gradients representable in float16; None leaves the logits as they are.
    """
    if runs_triton(logits):
        return launch(logits, targets, gradient_scale)
    return twin(logits, targets, gradient_scale)


def launch(logits: torch.Tensor, targets: torch.Tensor, gradient_scale: float | None) -> torch.Tensor:
    """The Triton kernel."""
    rows, vocabulary = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _kernel[(rows,)](
        logits, targets, loss, logits.stride(0), gradient_scale or 0.0,
        VOCABULARY=vocabulary, GRADIENT=gradient_scale is not None, BLOCK=BLOCK, num_warps=16,
    )  # fmt: skip
    return loss


def twin(logits: torch.Tensor, targets: torch.Tensor, gradient_scale: float | None) -> torch.Tensor:
    """The same in plain torch."""
    values = logits.float()
    lse = values.logsumexp(-1)
    loss = lse - values.gather(1, targets[:, None])[:, 0]
    if gradient_scale is not None:
        probabilities = torch.exp(values - lse[:, None])
        probabilities[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        logits.copy_(probabilities * gradient_scale)
    return loss
