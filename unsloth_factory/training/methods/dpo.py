"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    loss = -log sigmoid(beta * ((log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))))

with log pi(answer) = sum of the log-probabilities of the answer's tokens given the prompt. The reference is the policy
before its first step, on the same weights in memory: a fresh adapter switched off, or, when training continues an
adapter, that adapter as it was loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.data.batching import Batch, pack, pad
from unsloth_factory.data.types import TokenPair
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.log_probs import TrainedPositions, token_log_probs, trained_positions
from unsloth_factory.training.methods.base import LossSum


class Dpo:
    """Sigmoid DPO loss, summed over pairs."""

    name = "dpo"
    unit = "pair"
    figures = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    shares = frozenset({"rewards/accuracies"})

    def __init__(self, beta: float = 0.1) -> None:
        if beta <= 0:
            raise UserError(f"--beta {beta}: must be above 0, such as 0.1")
        self.beta = beta
        self._reference: list[torch.Tensor] | None = None

    def prepare(self, loaded: LoadedModel, tuning: TuningSettings) -> None:
        """Note the reference policy; it must be taken before the first update.

        Raises:
            UserError: There is no adapter to switch off.
        """
        if not loaded.has_adapter or tuning.finetuning_type != "lora":
            raise UserError(
                f"--finetuning_type {tuning.finetuning_type} with dpo: the reference model is the adapter switched "
                "off, and there is no adapter; a second copy of the model would not fit. Use --finetuning_type lora."
            )
        self._reference = _continued_adapter(loaded)

    def settings(self) -> dict[str, Any]:
        """Beta, and the reference policy if it is not the base model."""
        return {"beta": self.beta, "reference": "base" if self._reference is None else _digest(self._reference)}

    def make_batch(self, items: Sequence[TokenPair], *, packing: bool, pad_id: int) -> Batch:
        """All chosen rows, then all rejected rows, in one batch."""
        samples = [pair.chosen for pair in items] + [pair.rejected for pair in items]
        return pack(samples) if packing else pad(samples, pad_id)

    def count(self, batch: Batch) -> int:
        """Pairs."""
        return len(batch.sources) // 2

    def loss(self, loaded: LoadedModel, batch: Batch) -> LossSum:
        """DPO loss and the rewards beta * (log pi - log ref) of both answers."""
        positions = trained_positions(batch)
        # The reference goes first: its weights may be swapped in, and nothing may change between the policy's forward
        # and backward pass.
        with torch.no_grad(), self._reference_policy(loaded):
            reference = _answer_log_probs(loaded, batch, positions)
        policy = _answer_log_probs(loaded, batch, positions)
        pairs = self.count(batch)
        rewards = self.beta * (policy - reference)  # [2 * pairs], chosen first
        chosen, rejected = rewards[:pairs], rewards[pairs:]
        values = (chosen, rejected, (chosen > rejected).float(), chosen - rejected)
        return LossSum(
            total=-F.logsigmoid(chosen - rejected).sum(),
            count=pairs,
            metrics={name: value.detach().sum() for name, value in zip(self.figures, values, strict=True)},
        )

    def _reference_policy(self, loaded: LoadedModel) -> AbstractContextManager[None]:
        if self._reference is None:
            return loaded.adapter_disabled()
        return _swapped(loaded.trainable_parameters(), self._reference)


def _answer_log_probs(loaded: LoadedModel, batch: Batch, positions: TrainedPositions) -> torch.Tensor:
    """Sum of the answer's token log-probabilities for every sample of the batch, float32 [samples]."""
    log_probs = token_log_probs(loaded, batch, positions)
    # split + sum instead of index_add_: the same order of additions in every run, on a GPU too
    return torch.stack([part.sum() for part in log_probs.split(positions.lengths)])


def _continued_adapter(loaded: LoadedModel) -> list[torch.Tensor] | None:
    """Copies of the adapter's weights, or None when it is fresh (every B is 0, so switching it off is the same)."""
    named = [(name, p) for name, p in loaded.model.named_parameters() if p.requires_grad]
    if not any(bool(p.detach().any()) for name, p in named if "lora_B" in name):
        return None
    return [p.detach().clone() for _, p in named]


@contextmanager
def _swapped(parameters: list[torch.nn.Parameter], values: list[torch.Tensor]) -> Iterator[None]:
    trained = [p.data for p in parameters]
    try:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value
        yield
    finally:
        for parameter, value in zip(parameters, trained, strict=True):
            parameter.data = value


def _digest(tensors: list[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
