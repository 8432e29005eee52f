"""How surprised a model is by a given answer: one forward pass over prompt and answer, nothing generated.

Shapes: B rows, T tokens, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unsloth_factory.data.types import TokenSample
from unsloth_factory.inference.decoder import evaluating, pad_id_of
from unsloth_factory.inference.generate import Progress, length_batches
from unsloth_factory.inference.workers import run_batches
from unsloth_factory.model.loaded import LoadedModel

MAX_TOKENS = {"cpu": 2048, "cuda": 4096}
"""Tokens computed together: beyond that a batch is no faster. On a CPU its activations leave the cache: 12 % slower."""


@dataclass(frozen=True)
class AnswerLoss:
    """Loss of one answer."""

    total: float
    """Sum of -log p over the answer's tokens, the end-of-turn token among them, nats."""
    tokens: int


def answer_losses(
    loaded: LoadedModel,
    samples: Sequence[TokenSample],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> list[AnswerLoss]:
    """Loss of each sample's trained tokens, in the order of the samples.

    Only the positions that predict a trained token go through the output projection, `loaded.logit_bytes` of float32
    logits at a time, so that a vocabulary of 151,936 needs no more memory than generation does.

    Args:
        loaded: The model (within `loaded.adapter_disabled()` it is the base).
        samples: As training encodes them; `trained` marks the answer.
        batch_size: Samples computed together.
        on_progress: Called with (samples done, all).
    """
    losses: dict[int, AnswerLoss] = {}
    with evaluating(loaded):
        most = MAX_TOKENS.get(loaded.device.type, min(MAX_TOKENS.values()))
        batches = _batches([len(sample.ids) for sample in samples], batch_size, most)
        measured = run_batches(loaded, batches, lambda batch, _: _batch_losses(loaded, [samples[row] for row in batch]))
        for batch, totals in measured:
            for row, total in zip(batch, totals, strict=True):
                losses[row] = AnswerLoss(total, int(samples[row].trained[1:].sum()))
            if on_progress:
                on_progress(len(losses), len(samples))
    return [losses[row] for row in range(len(samples))]


def _batches(lengths: Sequence[int], batch_size: int, most: int) -> list[list[int]]:
    """Batches of like length, none of more than `most` tokens with its padding unless a row alone has more."""
    pieces = []
    for batch in length_batches(lengths, batch_size):
        rows = max(1, most // max(1, lengths[batch[0]]))
        pieces += [batch[start : start + rows] for start in range(0, len(batch), rows)]
    return pieces


@torch.inference_mode()
def _batch_losses(loaded: LoadedModel, samples: Sequence[TokenSample]) -> list[float]:
    """Summed loss of each row; padded on the right, where causal attention never sees it and needs no mask."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), width), pad_id_of(loaded), dtype=torch.long)
    trained = torch.zeros((len(samples), width), dtype=torch.bool)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.ids)] = torch.from_numpy(sample.ids.astype(np.int64))
        trained[row, : len(sample.ids)] = torch.from_numpy(sample.trained)
    positions = torch.arange(width).expand(len(samples), width)
    hidden = loaded.hidden_states(ids, positions, None)[:, :-1]  # [B, T - 1, h]
    predicts = trained[:, 1:]
    rows = predicts.nonzero()[:, 0]
    wanted, targets = hidden[predicts.to(hidden.device)], ids[:, 1:][predicts].to(hidden.device)
    piece = max(1, loaded.logit_bytes // (4 * loaded.vocabulary))
    totals = torch.zeros(len(samples), dtype=torch.float64)
    for start in range(0, len(targets), piece):
        with loaded.autocast():
            logits = loaded.lm_head(wanted[start : start + piece])
        loss = torch.nn.functional.cross_entropy(logits.float(), targets[start : start + piece], reduction="none")
        totals.index_add_(0, rows[start : start + piece], loss.double().cpu())
    return totals.tolist()
