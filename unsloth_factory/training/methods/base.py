"""What a training method is: a batch builder, a unit that is counted, and a loss that is summed over those units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.data.batching import Batch
from unsloth_factory.model.loaded import LoadedModel


@dataclass(frozen=True)
class LossSum:
    """Loss of one micro-batch before it is divided.

    The loop divides `total` by the count of the whole optimizer step, once; so short answers weigh no more than long
    ones, and batch 1 x 8 = 8 x 1 = packed.
    """

    total: torch.Tensor
    """Sum of the loss over the units, scalar float32, differentiable."""
    count: int
    """Units summed: trained tokens (SFT), pairs (DPO)."""
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    """The method's `figures`, each summed over the same units; left on the device, so that no micro-batch waits."""


class Method(Protocol):
    """A training method; `methods/__init__.py` has the table of all."""

    name: str
    unit: str
    """What the loss is averaged over, for messages: "token" or "pair"."""
    figures: tuple[str, ...]
    """Names of what `loss` gives beside the loss; metrics.jsonl has them under these names."""
    shares: frozenset[str]
    """Those `figures` that count units, 0 or 1 each: an evaluation shows them with their interval."""

    def prepare(self, loaded: LoadedModel, tuning: TuningSettings) -> None:
        """Check that the method fits the model and note what it needs of the untrained weights.

        Called once, before a checkpoint is restored.

        Raises:
            UserError: The method cannot train this model in this way.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """The method's own settings; a resumed run must have the same."""
        ...

    def make_batch(self, items: Sequence[Any], *, packing: bool, pad_id: int) -> Batch:
        """Token rows of some samples, packed into one row or padded to the longest."""
        ...

    def count(self, batch: Batch) -> int:
        """Units of a batch, known before its forward pass."""
        ...

    def loss(self, loaded: LoadedModel, batch: Batch) -> LossSum:
        """Sum of the loss over one batch."""
        ...
