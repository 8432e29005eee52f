"""How many tokens a micro-batch takes in memory, and how it is cut into smaller ones. Samples and order stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from unsloth_factory.data.types import TokenPair, TokenSample
from unsloth_factory.model.fast.planner import STEP

T = TypeVar("T")
CLEARLY = 0.01
"""Share of the time that other sizes of micro-batches must save: less is within what is measured."""
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
        cost: What a micro-batch of so many tokens takes. None: as few as fit. Otherwise smaller ones are tried too, and
            those whose costs add up to the least are taken.

    Returns:
        Micro-batches in the order of their first samples; samples keep their order.
    """
    tokens = [sum(lengths_of(sample)) for sample in samples]
    order = sorted(range(len(samples)), key=lambda index: -tokens[index])
    best = _fitted(tokens, order, budget)
    if cost is not None:
        least = (1 - CLEARLY) * sum(cost(total) for total, _ in best)
        for size in range(budget - STEP, budget // 2 - 1, -STEP):
            other = _fitted(tokens, order, size)
            whole = sum(cost(total) for total, _ in other)
            if whole < least:
                best, least = other, whole
    return [[samples[index] for index in one] for one in sorted(sorted(one) for _, one in best)]


def _fitted(tokens: Sequence[int], order: Sequence[int], budget: int) -> list[tuple[int, list[int]]]:
    """(tokens, samples) of micro-batches of at most `budget` tokens."""
    bins: list[tuple[int, list[int]]] = []
    for index in order:
        for place, (total, members) in enumerate(bins):
            if total + tokens[index] <= budget:
                members.append(index)
                bins[place] = (total + tokens[index], members)
                break
        else:
            bins.append((tokens[index], [index]))
    return bins


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
