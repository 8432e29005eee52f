"""Loss of a stored model on a run's validation split, with one weight matrix in memory at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.split import read_validation_split
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import TokenSample
from unsloth_factory.export.streamed import StreamedModel
from unsloth_factory.export.weights import WeightFolder
from unsloth_factory.inference.distributions import log_softmax

TOKEN_BUDGET = 4096  # an 8B model on two CPU cores needs about ten minutes for these


def validation_samples(folder: Path, split: Path, budget: int = TOKEN_BUDGET) -> list[TokenSample]:
    """Training rows of the split, in order, up to `budget` tokens (at least one row).

    Raises:
        UserError: The split holds no conversation.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    template = ChatTemplate.from_tokenizer(tokenizer)
    samples: list[TokenSample] = []
    used = 0
    for conversation in read_validation_split(split):
        for sample in template.encode_conversation(conversation):
            if samples and used + len(sample.ids) > budget:
                return samples
            samples.append(sample)
            used += len(sample.ids)
    if not samples:
        raise UserError(f"{split} holds no conversation: there is nothing to compare on.")
    return samples


def validation_loss(folder: Path, split: Path) -> float:
    """Mean negative log-likelihood per trained token, nats, of a stored model (float32)."""
    samples = validation_samples(folder, split)
    total, count = 0.0, 0
    with WeightFolder(folder) as stored:
        model = StreamedModel(folder, stored.tensor)
        for sample, logits in zip(samples, model.logits([list(s.ids) for s in samples]), strict=True):
            targets = np.flatnonzero(sample.trained[1:]) + 1
            log_probabilities = log_softmax(logits[targets - 1])
            total -= float(log_probabilities[np.arange(len(targets)), sample.ids[targets]].sum())
            count += len(targets)
    return total / max(count, 1)
