"""Which samples make an optimizer step, and how they become tensors.

A step is a pure function of (seed, step): there is no loader state to save, and a resumed run sees the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from unsloth_factory.data.types import TokenSample

IGNORED = -100


@lru_cache(maxsize=4)
def _epoch_order(n_samples: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch])))
    order = generator.permutation(n_samples)
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class StepPlan:
    """The samples of every optimizer step.

    One step takes batch_size x accumulation_steps consecutive samples of the epoch's order; the last step of an epoch
    takes what is left. `epochs` may be a fraction; `max_steps` wins over it.
    """

    n_samples: int
    batch_size: int
    accumulation_steps: int
    epochs: float
    max_steps: int | None
    seed: int

    def __post_init__(self) -> None:
        assert self.n_samples >= 1, "a plan needs samples"

    @property
    def samples_per_step(self) -> int:
        """Samples of a full optimizer step."""
        return self.batch_size * self.accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass, the last one perhaps smaller."""
        return -(-self.n_samples // self.samples_per_step)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        # The small subtraction keeps 0.1 epochs of 10 steps at 1 step, in spite of binary fractions.
        return max(1, math.ceil(self.epochs * self.steps_per_epoch - 1e-6))

    def step(self, k: int) -> list[list[int]]:
        """Micro-batches of sample indices of optimizer step `k`, counted from 0."""
        epoch, position = divmod(k, self.steps_per_epoch)
        order = _epoch_order(self.n_samples, self.seed, epoch)
        start = position * self.samples_per_step
        chosen = order[start : start + self.samples_per_step].tolist()
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]

    def samples_seen(self, k: int) -> int:
        """Samples used by the steps before step `k`."""
        epoch, position = divmod(k, self.steps_per_epoch)
        return epoch * self.n_samples + min(position * self.samples_per_step, self.n_samples)

    def epoch(self, k: int) -> float:
        """Passes finished before step `k`."""
        return self.samples_seen(k) / self.n_samples


@dataclass(frozen=True)
class Batch:
    """One micro-batch, tensors on the CPU; B rows, T positions.

    `targets` are already shifted: targets[b, t] is the token that position t predicts, -100 where nothing is trained.
    """

    input_ids: torch.Tensor
    """int64 [B, T]"""
    position_ids: torch.Tensor
    """int64 [B, T]; restarts at 0 with every document of a packed row."""
    attention_mask: torch.Tensor | None
    """int64 [B, T], 0 on padding; None when packed: a mask would switch the document detection off."""
    targets: torch.Tensor
    """int64 [B, T]"""
    document_ids: torch.Tensor | None
    """int32 [B, T]: number of the document in a packed row; None when padded."""
    sources: tuple[str, ...]

    @property
    def trained_tokens(self) -> int:
        """Positions whose loss counts."""
        return int((self.targets != IGNORED).sum())

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def shifted_targets(sample: TokenSample) -> np.ndarray:
    """int64 [T]: the token that each position predicts; the last position predicts nothing."""
    targets = np.full(len(sample.ids), IGNORED, dtype=np.int64)
    targets[:-1] = np.where(sample.trained[1:], sample.ids[1:], IGNORED)
    return targets


def pack(samples: Sequence[TokenSample]) -> Batch:
    """One row holding all samples one after the other, [1, sum of lengths].

    Positions restart at every document and there is no mask: from that, transformers' attention (use_cache=False) and
    the fast engine keep the documents apart exactly.
    """
    lengths = [len(sample.ids) for sample in samples]
    documents = np.repeat(np.arange(len(samples), dtype=np.int32), lengths)
    return Batch(
        input_ids=_row([sample.ids.astype(np.int64) for sample in samples]),
        position_ids=_row([np.arange(length) for length in lengths]),
        attention_mask=None,
        targets=_row([shifted_targets(sample) for sample in samples]),
        document_ids=torch.from_numpy(documents)[None],
        sources=tuple(sample.source for sample in samples),
    )


def pad(samples: Sequence[TokenSample], pad_id: int) -> Batch:
    """One row per sample, padded on the right to the longest, [B, max length]."""
    width = max(len(sample.ids) for sample in samples)
    shape = (len(samples), width)
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    targets = np.full(shape, IGNORED, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for row, sample in enumerate(samples):
        length = len(sample.ids)
        input_ids[row, :length] = sample.ids
        targets[row, :length] = shifted_targets(sample)
        mask[row, :length] = 1
    positions = np.broadcast_to(np.arange(width), shape).copy()
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.from_numpy(mask),
        targets=torch.from_numpy(targets),
        document_ids=None,
        sources=tuple(sample.source for sample in samples),
    )


def _row(parts: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts))[None]
