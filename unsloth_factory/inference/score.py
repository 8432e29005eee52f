"""Log-probabilities of given continuations after their contexts, without generating anything.

What many contexts share at their start (the worked examples of a subject) is computed once. The rest of each, its tail,
is laid behind it in one row, tail after tail, with a mask that lets a tail read the shared start and itself alone: no
padding, and the shared keys and values are there once, not once a question. Of 1,346 C-Eval questions with 5 worked
examples 133,000 of 712,000 tokens remain to be computed, in some 60 passes.

Shapes: T tokens of a pass, S of them and of what the cache holds, V vocabulary. Only positions that predict a wanted
token go through the output projection: the full logits of 2,000 tokens would be 1.2 GB at a vocabulary of 151,936.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from unsloth_factory.inference.decoder import evaluating, forward, new_cache
from unsloth_factory.inference.generate import Progress
from unsloth_factory.model.loaded import LoadedModel

MIN_PREFIX = 32
"""A shorter common start is not worth keeping, tokens."""
PASS_TOKENS = {"cuda": 3072, "cpu": 512}
"""Tokens of a pass. On a GPU fewer would wait for Python; on a CPU more would only make the mask grow."""
POSITIONS = 256
"""Positions of a pass that go through the output projection: 160 MB of float32 logits at a vocabulary of 151,936."""


@dataclass
class _Row:
    """Tokens to compute, and the requests that they answer: those whose context and continuation they are."""

    tokens: tuple[int, ...]
    requests: list[int] = field(default_factory=list)
    first: int = 0
    """The first position whose logits are wanted."""

    def add(self, request: int, context: int) -> None:
        """A request with so many tokens of context."""
        self.first = min(self.first, context - 1) if self.requests else context - 1
        self.requests.append(request)


@dataclass(frozen=True)
class _Pass:
    """Rows that are computed together, behind what they share."""

    rows: Sequence[_Row]
    shared: int


def choice_logprobs(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    choice_ids: Sequence[Sequence[list[int]]],
    *,
    at_once: int | None = None,
    on_progress: Progress | None = None,
) -> np.ndarray:
    """Sum of the log-probabilities of each choice's tokens after its prompt.

    What prompts have in common at their start is computed once, so one call should hold prompts that share it (the
    questions of one subject behind the same worked examples).

    Args:
        loaded: The model.
        prompts: n prompts, token ids.
        choice_ids: For each prompt the token ids of its choices, at least one each; all have the same number c.
        at_once: Most rows of a pass; None: as many as fit into `PASS_TOKENS`.
        on_progress: Called with (prompts done, n).

    Returns:
        Float64 [n, c].
    """
    columns = len(choice_ids[0]) if choice_ids else 0
    requests = [(prompt, choice) for prompt, row in zip(prompts, choice_ids, strict=True) for choice in row]

    def progress(done: int, _: int) -> None:
        if on_progress:
            on_progress(done // columns, len(prompts))

    answers = continuation_logprobs(loaded, requests, at_once=at_once, on_progress=progress)
    return np.array([value for value, _ in answers], dtype=np.float64).reshape(len(prompts), columns)


def continuation_logprobs(
    loaded: LoadedModel,
    requests: Sequence[tuple[list[int], list[int]]],
    *,
    at_once: int | None = None,
    on_progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """Log-probability of each continuation after its context, and whether greedy decoding would say just that.

    Requests whose contexts begin alike share that beginning; requests of the same tokens, and continuations of one
    token after the same context, share their row.

    Args:
        loaded: The model.
        requests: n pairs of context and continuation, token ids, at least one each.
        at_once: Most rows of a pass; None: as many as fit into `PASS_TOKENS`.
        on_progress: Called with (requests done, n).

    Returns:
        n pairs (sum of log-probabilities, all of its tokens are the likeliest).
    """
    rows: dict[tuple[int, ...], _Row] = {}
    for index, (context, continuation) in enumerate(requests):
        tokens = (*context, *continuation[:-1])
        rows.setdefault(tokens, _Row(tokens)).add(index, len(context))
    results: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    done = 0
    with evaluating(loaded), torch.inference_mode():
        for shared, group in _groups(list(rows.values())):
            cache = new_cache(loaded)
            for work in _passes(loaded, group, shared, cache, at_once):
                for request, answer in _compute(loaded, work, cache if work.shared else None, requests):
                    results[request] = answer
                    done += 1
                if on_progress:
                    on_progress(done, len(requests))
    return results


def _groups(rows: list[_Row]) -> Iterator[tuple[int, list[_Row]]]:
    """(tokens that all rows of the group share, the rows); what shares nothing comes last, together."""
    alike: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        alike.setdefault(row.tokens[:MIN_PREFIX] if row.first >= MIN_PREFIX else (), []).append(row)
    alone = alike.pop((), [])
    for group in alike.values():
        if len(group) == 1:
            alone += group
        else:
            yield _shared(group), group
    if alone:
        yield 0, alone


def _shared(rows: Sequence[_Row]) -> int:
    """Tokens at the start that all rows have in common, and that predict nothing that is wanted."""
    low, high = min(row.tokens for row in rows), max(row.tokens for row in rows)  # the two that differ earliest
    most = min(row.first for row in rows)
    return next((place for place in range(most) if low[place] != high[place]), most)


def _passes(loaded: LoadedModel, rows: Sequence[_Row], shared: int, cache: Any, at_once: int | None) -> Iterator[_Pass]:
    """Rows in their order, as many in a pass as may be; the first pass computes the shared start as well."""
    most = PASS_TOKENS.get(loaded.device.type, PASS_TOKENS["cpu"])
    windows = [layer.sliding_window for layer in cache.layers if getattr(layer, "is_sliding", False)]
    # A sliding window counts tokens of the row, so that other tails would push the shared start out of it.
    window = min(windows, default=math.inf) - shared
    taken: list[_Row] = []
    tokens = positions = 0
    left = shared
    for row in rows:
        length, wanted = len(row.tokens) - shared, len(row.tokens) - row.first
        if length >= window:
            yield _Pass([row], 0)
            continue
        full = left + tokens + length > most or tokens + length >= window or positions + wanted > POSITIONS
        if taken and (full or len(taken) == at_once):
            yield _Pass(taken, shared)
            taken, tokens, positions, left = [], 0, 0, 0
        taken.append(row)
        tokens += length
        positions += wanted
    if taken:
        yield _Pass(taken, shared)


def _compute(
    loaded: LoadedModel, work: _Pass, cache: Any, requests: Sequence[tuple[list[int], list[int]]]
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(request, its answer) of all requests of a pass."""
    logits, starts = _logits(loaded, work, cache)
    places: list[int] = []
    tokens: list[int] = []
    counts: list[tuple[int, int]] = []
    for row, start in zip(work.rows, starts, strict=True):
        for request in row.requests:
            context, continuation = requests[request]
            begin = start + len(context) - 1 - row.first
            places += range(begin, begin + len(continuation))
            tokens += continuation
            counts.append((request, len(continuation)))
    place, token = (torch.tensor(numbers, device=logits.device) for numbers in (places, tokens))
    values = (logits[place, token] - logits.logsumexp(dim=-1)[place]).double().cpu()
    likeliest = (logits.argmax(dim=-1)[place] == token).cpu()
    sums, greedy = values.split([count for _, count in counts]), likeliest.split([count for _, count in counts])
    for (request, _), value, same in zip(counts, sums, greedy, strict=True):
        yield request, (float(value.sum()), bool(same.all()))


def _logits(loaded: LoadedModel, work: _Pass, cache: Any) -> tuple[torch.Tensor, list[int]]:
    """Float32 logits [positions, V] of all wanted positions of a pass, and where each row's begin."""
    shared, past = work.shared, 0
    if cache is None:
        cache = new_cache(loaded)
    else:
        past = cache.get_seq_length()
    start = work.rows[0].tokens[: shared - past]  # all of it, or nothing
    tails = [row.tokens[shared:] for row in work.rows]
    ids, positions, owners = list(start), list(range(past, shared)), [0] * len(start)
    wanted: list[int] = []
    begins = []
    for owner, (row, tail) in enumerate(zip(work.rows, tails, strict=True), 1):
        begins.append(len(wanted))
        wanted += range(len(ids) + row.first - shared, len(ids) + len(tail))
        ids += tail
        positions += range(shared, shared + len(tail))
        owners += [owner] * len(tail)
    device = loaded.device
    index = torch.tensor(wanted, device=device)
    if shared or len(tails) > 1:
        mask = _mask(torch.tensor([0] * past + owners, device=device), len(ids), loaded.dtype)
    else:  # the model makes its own, which knows of sliding windows
        mask = torch.ones(1, len(ids), dtype=torch.long, device=device)
    logits = forward(
        loaded, torch.tensor([ids], device=device), torch.tensor([positions], device=device), mask, cache, index
    )
    if shared:
        cache.crop(-sum(map(len, tails)))
    return logits[0].float(), begins


def _mask(owners: torch.Tensor, new: int, dtype: torch.dtype) -> torch.Tensor:
    """What each of the `new` last tokens may read, to be added to its scores: [1, 1, new, S].

    Args:
        owners: int64 [S], the tail that a token belongs to; 0: the shared start.
        new: Tokens of the pass.
        dtype: Of the scores.
    """
    total = len(owners)
    allowed = (owners == 0) | (owners == owners[total - new :, None])
    allowed &= torch.ones_like(allowed).tril(total - new)
    # attention kernels read rows that begin at multiples of 16 numbers without copying the mask first
    room = torch.full((new, -(-total // 16) * 16), torch.finfo(dtype).min, dtype=dtype, device=owners.device)
    return room[:, :total].masked_fill_(allowed, 0.0)[None, None]
