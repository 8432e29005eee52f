"""How many tokens a micro-batch takes in memory, and how it is cut into smaller ones. Samples and order stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import permutations, product
from typing import TypeVar

from unsloth_factory.data.types import TokenPair, TokenSample
from unsloth_factory.model.fast.planner import STEP

T = TypeVar("T")
CLEARLY = 0.0025
"""Share of the time that other micro-batches must save: less is within what is measured."""
EXCHANGES = 200_000
"""Moves and exchanges of samples of a step: when so many were looked at, in 0.1 s, no further round of them begins."""
Bin = tuple[int, list[int]]
"""Tokens of a micro-batch, and the numbers of its samples."""
Lengths = tuple[int, ...]
"""Tokens of each row that a sample becomes: one, or two for a preference pair."""


def row_lengths(item: TokenSample | TokenPair) -> Lengths:
    """Tokens of the rows of a sample."""
    rows = (item.chosen, item.rejected) if isinstance(item, TokenPair) else (item,)
    return tuple(len(row.ids) for row in rows)


def memory_tokens(lengths: Sequence[Lengths], packing: bool) -> int:
    """Positions of a micro-batch of such samples, padding included."""
    if packing:
        return sum(map(sum, lengths))
    return sum(map(len, lengths)) * max(map(max, lengths))


def merged(
    samples: Sequence[T], lengths_of: Callable[[T], Lengths], budget: int, cost: Callable[[int], float] | None = None
) -> list[Sequence[T]]:
    """The samples of a step in packed micro-batches: longest first into the first that has room.

    Args:
        samples: Of one optimizer step.
        lengths_of: Tokens of the rows of a sample.
        budget: Most tokens of a micro-batch; one sample alone may have more.
        cost: What a micro-batch of so many tokens takes. None: as few as fit. Otherwise smaller ones are tried too,
            samples change places between them, and those whose costs add up to the least are taken.

    Returns:
        Micro-batches in the order of their first samples; samples keep their order.
    """
    tokens = [sum(lengths_of(sample)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: -tokens[index])
    best = _fitted(tokens, order, budget)
    if cost is not None:
        least, left = (1 - CLEARLY) * sum(cost(total) for total, _ in best), EXCHANGES
        for size in range(budget, budget // 2 - 1, -STEP):
            other, left = _exchanged(tokens, _fitted(tokens, order, size), budget, cost, left)
            whole = sum(cost(total) for total, _ in other)
            if whole < least:
                best, least = other, whole
    return [[samples[index] for index in one] for one in sorted(sorted(one) for _, one in best)]


def _fitted(tokens: Sequence[int], order: Sequence[int], budget: int) -> list[Bin]:
    """Micro-batches of at most `budget` tokens."""
    bins: list[Bin] = []
    for index in order:
        for place, (total, members) in enumerate(bins):
            if total + tokens[index] <= budget:
                members.append(index)
                bins[place] = (total + tokens[index], members)
                break
        else:
            bins.append((tokens[index], [index]))
    return bins


def _exchanged(
    tokens: Sequence[int], bins: Sequence[Bin], budget: int, cost: Callable[[int], float], left: int
) -> tuple[list[Bin], int]:
    """The micro-batches after samples have changed places, as long as that makes two of them cost less together.

    Costs grow in steps, so it is tokens just above a step that are saved: 0.8 % of the mean-900 mix of
    benchmarks/engine.py with the costs of Qwen3-8B on an H200, of the 1.8 % that are rounded up.

    Args:
        tokens: Of each sample.
        bins: As they are.
        budget: As for `merged`.
        cost: As for `merged`.
        left: Exchanges that may still be looked at.

    Returns:
        The micro-batches that are left, and how many exchanges are.
    """
    found, settled = [(total, list(members)) for total, members in bins], False
    while not settled and left > 0:
        settled = True
        for a, b in permutations(range(len(found)), 2):
            (total_a, one), (total_b, other) = found[a], found[b]
            least = (cost(total_a) if one else 0.0) + (cost(total_b) if other else 0.0)
            least, best = least - 1e-6 * abs(least), None
            for i, j in product(one, (None, *(other if a < b else ()))):  # one moves, or two change places
                moved = tokens[i] - (0 if j is None else tokens[j])
                if (moved > 0 and total_b + moved > budget) or (moved < 0 and total_a - moved > budget):
                    continue
                together = (cost(total_a - moved) if total_a > moved else 0.0) + cost(total_b + moved)
                if together < least:
                    least, best = together, (i, j, moved)
            left -= len(one) * (1 + len(other) * (a < b))
            if best is not None:
                i, j, moved = best
                one.remove(i)
                other.append(i)
                if j is not None:
                    other.remove(j)
                    one.append(j)
                found[a], found[b], settled = (total_a - moved, one), (total_b + moved, other), False
    return [one for one in found if one[1]], left


def cut(
    samples: Sequence[T], lengths_of: Callable[[T], Lengths], *, limit: int | None, packing: bool
) -> list[Sequence[T]]:
    """Consecutive pieces, each as long as the limit allows.

    Args:
        samples: One micro-batch.
        lengths_of: Tokens of the rows of a sample.
        limit: Most positions of a piece; one sample alone may have more. None cuts nothing.
        packing: Samples share one row.
    """
    if limit is None or memory_tokens([lengths_of(sample) for sample in samples], packing) <= limit:
        return [samples]
    pieces: list[list[T]] = []
    for sample in samples:
        longer = [*pieces[-1], sample] if pieces else []
        if longer and memory_tokens([lengths_of(one) for one in longer], packing) <= limit:
            pieces[-1] = longer
        else:
            pieces.append([sample])
    return list(pieces)
