"""Log-probability of each choice after a prompt, without generating anything.

Shapes: n prompts, c choices, B rows, T tokens, V vocabulary. Only the last positions go through the output
projection: the full logits of one prompt of 2,000 tokens would be 1.2 GB at a vocabulary of 151,936. Of those that do,
the log-probabilities of the choices' own tokens alone are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from unsloth_factory.inference.decoder import evaluating, forward, new_cache, pad_id_of, pad_left
from unsloth_factory.inference.generate import Progress
from unsloth_factory.model.loaded import LoadedModel

MIN_PREFIX = 32
"""A shorter common prefix is not worth a pass of its own, tokens."""
PADDING = 0.15
"""Most padding in a batch, as a share of its positions: beyond it, computing less beats computing together."""


def choice_logprobs(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    choice_ids: Sequence[Sequence[list[int]]],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Sum of the log-probabilities of each choice's tokens after its prompt.

    What all prompts have in common at their start is computed once, so one call should hold prompts that share it (the
    questions of one subject behind the same worked examples).

    Args:
        loaded: The model.
        prompts: n prompts, token ids.
        choice_ids: For each prompt the token ids of its choices, at least one each; all have the same number c.
        batch_size: Prompts computed together.
        on_progress: Called with (prompts done, n).

    Returns:
        Float64 [n, c].
    """
    rows = [(index, choice) for index, choices in enumerate(choice_ids) for choice in _extensions(choices)]
    # A choice of several tokens is appended, all but its last token, to a row of its own.
    sequences = [[*prompts[index], *extension] for index, extension in rows]
    prefix = _common_prefix(prompts)
    scores = np.full((len(prompts), len(choice_ids[0]) if choice_ids else 0), np.nan)
    with evaluating(loaded), torch.inference_mode():
        cache = _prefill(loaded, sequences[0][:prefix]) if prefix else None
        for batch in _batches([len(sequence) - prefix for sequence in sequences], batch_size):
            last = 1 + max(len(rows[row][1]) for row in batch)
            logits = _tail_logits(loaded, [sequences[row][prefix:] for row in batch], cache, prefix, last)
            for slot, row in enumerate(batch):
                index, extension = rows[row]
                _fill(scores[index], choice_ids[index], extension, logits[slot])
            if on_progress:
                on_progress(int((~np.isnan(scores).any(axis=1)).sum()), len(prompts))
    return scores


def _extensions(choices: Sequence[list[int]]) -> list[tuple[int, ...]]:
    """What must stand behind the prompt so that each choice's last token is predicted; () for one-token choices."""
    return sorted({tuple(choice[:-1]) for choice in choices})


def _common_prefix(prompts: Sequence[list[int]]) -> int:
    """Tokens that all prompts share, at least one of each left over; 0 when it is not worth it."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)  # the two that differ earliest
    shared = 0
    while shared < min(len(low), len(high)) and low[shared] == high[shared]:
        shared += 1
    shared = min(shared, min(len(prompt) for prompt in prompts) - 1)
    return shared if shared >= MIN_PREFIX else 0


def _batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first (memory peaks at once), with little padding."""
    batches: list[list[int]] = []
    real = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = bool(batches) and len(batches[-1]) < batch_size
        if room and real + lengths[index] >= (1 - PADDING) * lengths[batches[-1][0]] * (len(batches[-1]) + 1):
            batches[-1].append(index)
            real += lengths[index]
        else:
            batches.append([index])
            real = lengths[index]
    return batches


def _prefill(loaded: LoadedModel, prefix: list[int]) -> Any:
    cache = new_cache(loaded)
    ids = torch.tensor([prefix], device=loaded.device)
    positions = torch.arange(len(prefix), device=loaded.device).unsqueeze(0)
    forward(loaded, ids, positions, torch.ones_like(ids), cache)
    return cache


def _tail_logits(loaded: LoadedModel, rows: list[list[int]], cache: Any, prefix: int, last: int) -> torch.Tensor:
    """Logits at the last positions of each row, [B, last, V]."""
    ids, mask = (tensor.to(loaded.device) for tensor in pad_left(rows, pad_id_of(loaded)))
    positions = (mask.cumsum(1) - 1).clamp(min=0) + prefix
    if cache is None:
        own = new_cache(loaded)
    else:
        own = copy.deepcopy(cache)
        own.batch_repeat_interleave(len(rows))
        mask = torch.cat([mask.new_ones((len(rows), prefix)), mask], dim=1)
    return forward(loaded, ids, positions, mask, own, last)


def _fill(scores: np.ndarray, choices: Sequence[list[int]], extension: tuple[int, ...], logits: torch.Tensor) -> None:
    """Write the choices that this row decides; logits is [last, V], its last row predicts the token after it."""
    own = logits[logits.shape[0] - 1 - len(extension) :].float()  # one row at a time: V is large
    normalizers = own.logsumexp(dim=-1)
    decided = [column for column, choice in enumerate(choices) if tuple(choice[:-1]) == extension]
    tokens = torch.tensor([choices[column] for column in decided], device=own.device)  # [decided, 1 + extension]
    places = torch.arange(len(own), device=own.device)
    scores[decided] = (own[places, tokens] - normalizers).double().sum(dim=1).cpu().numpy()
