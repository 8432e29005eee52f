"""How many tokens a micro-batch takes in memory, and how it is cut into smaller ones. Samples and order stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from unsloth_factory.data.types import TokenPair, TokenSample

T = TypeVar("T")
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


def merged(samples: Sequence[T], lengths_of: Callable[[T], Lengths], budget: int) -> list[Sequence[T]]:
    """The samples of a step in as few packed micro-batches as fit: longest first into the first that has room.

    Args:
        samples: Of one optimizer step.
        lengths_of: Tokens of the rows of a sample.
        budget: Most tokens of a micro-batch; one sample alone may have more.

    Returns:
        Micro-batches in the order of their first samples; samples keep their order.
    """
    tokens = [sum(lengths_of(sample)) for sample in samples]
    bins: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda index: -tokens[index]):
        place = next((b for b in bins if sum(tokens[i] for i in b) + tokens[index] <= budget), None)
        if place is None:
            bins.append([index])
        else:
            place.append(index)
    return [[samples[index] for index in one] for one in sorted(sorted(one) for one in bins)]


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
