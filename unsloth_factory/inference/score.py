"""Log-probability of each choice after a prompt, without generating anything.

Shapes: n prompts, c choices, B rows, T tokens, V vocabulary. Only the last positions go through the output
projection: the full logits of one prompt of 2,000 tokens would be 1.2 GB at a vocabulary of 151,936. Of those that do,
the log-probabilities of the choices' own tokens alone are kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from unsloth_factory.inference.decoder import evaluating, forward, new_cache, pad_id_of, pad_left
from unsloth_factory.inference.generate import Progress
from unsloth_factory.model.loaded import LoadedModel

MIN_PREFIX = 32
"""A shorter common prefix is not worth a pass of its own, tokens."""
LONG = 256
"""Continuations of more tokens than this go through the output projection one at a time."""
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


def continuation_logprobs(
    loaded: LoadedModel,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether greedy decoding would say just that.

    Requests whose contexts begin alike share that beginning; continuations of one token share their context's row.

    Args:
        loaded: The model.
        requests: n pairs of context and continuation, token ids, at least one each.
        batch_size: Rows computed together; a row of a long continuation (perplexity) goes alone.
        on_progress: Called with (requests done, n).

    Returns:
        n pairs (sum of log-probabilities, all of its tokens are the likeliest).
    """
    wanted: dict[tuple[tuple[int, ...], int], list[int]] = {}  # (row's tokens, how many of them are continuation)
    for index, (context, continuation) in enumerate(requests):
        key = ((*context, *continuation[:-1]), len(continuation) - 1)
        wanted.setdefault(key, []).append(index)
    groups: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
    for tokens, extra in wanted:
        start = tokens[: min(MIN_PREFIX, len(tokens) - extra)]
        groups.setdefault(start, []).append((tokens, extra))
    results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    done = 0
    with evaluating(loaded), torch.inference_mode():
        for rows in groups.values():
            for batch, logits in _group_logits(loaded, rows, batch_size):
                for slot, row in enumerate(batch):
                    for index in wanted[row]:
                        results[index] = _continuation(requests[index][1], logits[slot])
                        done += 1
                if on_progress:
                    on_progress(done, len(requests))
    return results


def _group_logits(
    loaded: LoadedModel, rows: list[tuple[tuple[int, ...], int]], batch_size: int
) -> Iterator[tuple[list[tuple[tuple[int, ...], int]], torch.Tensor]]:
    """Batches of rows that begin alike, with the logits at their last positions, [B, last, V]."""
    prefix = _common_prefix([list(tokens[: len(tokens) - extra]) for tokens, extra in rows])
    cache = _prefill(loaded, list(rows[0][0][:prefix])) if prefix else None
    for few in (True, False):
        part = [row for row in rows if (row[1] < LONG) == few]
        size = batch_size if few else 1
        for places in _batches([len(tokens) - prefix for tokens, _ in part], size):
            batch = [part[place] for place in places]
            last = 1 + max(extra for _, extra in batch)
            tails = [list(tokens[prefix:]) for tokens, _ in batch]
            yield batch, _tail_logits(loaded, tails, cache, prefix, last)


def _continuation(continuation: list[int], logits: torch.Tensor) -> tuple[float, bool]:
    """Sum of log-probabilities of a continuation whose last token the last row of logits [last, V] predicts."""
    own = logits[logits.shape[0] - len(continuation) :].float()
    tokens = torch.tensor(continuation, device=own.device)
    chosen = own.gather(1, tokens.unsqueeze(1)).squeeze(1) - own.logsumexp(dim=-1)
    return float(chosen.double().sum()), bool((own.argmax(dim=-1) == tokens).all())


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
