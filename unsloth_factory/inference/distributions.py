"""Distributions over the next token from logits. V vocabulary."""

from __future__ import annotations

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64, [..., V]."""
    values = logits.astype(np.float64)
    values -= values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each position in nats, [T]; both [T, V] logits (the other may be padded wider)."""
    width = min(reference.shape[-1], other.shape[-1])
    p, q = log_softmax(reference[..., :width]), log_softmax(other[..., :width])
    return (np.exp(p) * (p - q)).sum(-1)
