"""Supervised fine-tuning: cross entropy of the assistant's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.data.batching import Batch, pack, pad
from unsloth_factory.data.types import TokenSample
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.log_probs import cross_entropy, trained_positions
from unsloth_factory.training.methods.base import LossSum


class Sft:
    """Next-token cross entropy, summed over the trained tokens."""

    name = "sft"
    unit = "token"
    figures: tuple[str, ...] = ()
    shares: frozenset[str] = frozenset()

    def prepare(self, loaded: LoadedModel, tuning: TuningSettings) -> None:
        """Nothing to check: every model and every choice of parameters can be trained so."""

    def settings(self) -> dict[str, Any]:
        """No settings of its own."""
        return {}

    def make_batch(self, items: Sequence[TokenSample], *, packing: bool, pad_id: int) -> Batch:
        """One row of all samples (packing), or one row each, padded."""
        return pack(items) if packing else pad(items, pad_id)

    def count(self, batch: Batch) -> int:
        """Trained tokens."""
        return batch.trained_tokens

    def loss(self, loaded: LoadedModel, batch: Batch) -> LossSum:
        """Negative log-likelihood of the trained tokens."""
        positions = trained_positions(batch)
        return LossSum(total=cross_entropy(loaded, batch, positions), count=len(positions.index))
