"""Log-probabilities of the trained tokens, without ever holding the logits of a whole batch.

Shapes: B rows, T tokens, h hidden size, V vocabulary, N trained positions of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from unsloth_factory.data.batching import IGNORED, Batch
from unsloth_factory.kernels.transfer import to_device
from unsloth_factory.model.loaded import LoadedModel


@dataclass(frozen=True)
class TrainedPositions:
    """Where a batch is trained. Found on the CPU, so that the GPU need not be waited for."""

    index: torch.Tensor
    """int64 [N], into the batch's B x T positions."""
    targets: torch.Tensor
    """int64 [N], the token that each of them predicts."""
    lengths: list[int]
    """Trained tokens of each sample, in the batch's order; they sum to N."""


def trained_positions(batch: Batch) -> TrainedPositions:
    """The positions of a batch that have a target."""
    targets = batch.targets.reshape(-1)
    index = (targets != IGNORED).nonzero().squeeze(1)
    if batch.document_ids is None:
        owner = index // batch.targets.shape[1]
    else:
        owner = batch.document_ids.reshape(-1)[index].long()
    lengths = torch.bincount(owner, minlength=len(batch.sources)).tolist()
    return TrainedPositions(index, targets[index], lengths)


def token_log_probs(loaded: LoadedModel, batch: Batch, positions: TrainedPositions) -> torch.Tensor:
    """Log-probability of every trained token, float32 [N], differentiable.

    The output projection is applied to trained positions only (a prompt costs no logits), in chunks of
    `loaded.logit_bytes`; a chunk's logits are computed again in the backward pass instead of being kept.
    """
    rows, targets = _trained_rows(loaded, batch, positions)
    head = loaded.lm_head
    size = chunk_rows(loaded)
    if len(rows) <= size:
        return _chunk_log_probs(head, rows, targets)
    pieces = [
        checkpoint(_chunk_log_probs, head, rows[start : start + size], targets[start : start + size],
                   use_reentrant=False, preserve_rng_state=False)
        for start in range(0, len(rows), size)
    ]  # fmt: skip
    return torch.cat(pieces)


def cross_entropy(loaded: LoadedModel, batch: Batch, positions: TrainedPositions) -> torch.Tensor:
    """Negative log-likelihood of all trained tokens, float32 scalar, differentiable.

    The fast engine makes the gradient of the logits together with them, so that no product runs twice.
    """
    if loaded.engine != "fast":
        return -token_log_probs(loaded, batch, positions).sum()
    from unsloth_factory.model.fast.head import cross_entropy_sum

    rows, targets = _trained_rows(loaded, batch, positions)
    weight = loaded.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    return cross_entropy_sum(rows, weight, targets, loaded.logit_bytes)


def _trained_rows(loaded: LoadedModel, batch: Batch, positions: TrainedPositions) -> tuple[torch.Tensor, torch.Tensor]:
    """(hidden states [N, h], targets [N]) of the trained positions, on the device."""
    rows = loaded.hidden_rows(batch.input_ids, batch.position_ids, batch.attention_mask, positions.index)
    return rows, to_device(positions.targets, loaded.device)


def chunk_rows(loaded: LoadedModel) -> int:
    """Positions whose logits are held at a time."""
    return max(1, loaded.logit_bytes // (4 * loaded.vocabulary))


def _chunk_log_probs(head: torch.nn.Module, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(head(rows).float(), targets, reduction="none")
