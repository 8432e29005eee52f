"""Choose the next token: the likeliest one, or a draw with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Temperature 0 is greedy and ignores the rest."""

    temperature: float = 0.0
    top_p: float = 1.0
    """Nucleus sampling (Holtzman et al. 2020, arXiv 1904.09751): the smallest set with at least this probability."""
    top_k: int = 0
    """Only the k likeliest tokens; 0 for all."""
    seed: int = 0
    """Row i of a call draws from the stream (seed, i), whatever batch it is computed in."""


GREEDY = Sampling()


def row_streams(sampling: Sampling, rows: Sequence[int]) -> list[np.random.Generator]:
    """One random stream for each row."""
    return [np.random.default_rng((sampling.seed, row)) for row in rows]


def choose(logits: torch.Tensor, sampling: Sampling, streams: Sequence[np.random.Generator]) -> list[int]:
    """The next token of each row.

    Args:
        logits: Float32 [B, V].
        sampling: How to draw.
        streams: One random stream a row; unused when greedy.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
    top, tokens = (logits / sampling.temperature).topk(k, dim=-1)  # sorted, likeliest first
    probabilities = top.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    draws = torch.tensor([stream.random() for stream in streams], dtype=logits.dtype, device=logits.device)
    # Inverse of the distribution function; the clamp guards a draw of 1 - 1e-8 against rounding in the sum.
    kept = (probabilities > 0).sum(dim=-1, keepdim=True)
    index = torch.searchsorted(cumulative, draws.unsqueeze(1) * cumulative[:, -1:], right=True).clamp(max=kept - 1)
    return tokens.gather(1, index).squeeze(1).tolist()
