"""Held-out rows that the training rows give away: the same row, nearly the same row, or long passages in common.

The passage test is that of the GPT-3 paper (Brown et al. 2020, arXiv 2005.14165, appendix C): n-grams of 13 words,
those that occur in more than 10 rows left out as stock phrases. A row is reported when one training row has at least
half of its remaining n-grams. Scripts without blanks count characters as words. Rows of fewer than 13 words have no
such n-gram; they leak only when the whole row is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from unsloth_factory.data.duplicates import Group, find_duplicates
from unsloth_factory.data.ngrams import normalized, word_ngrams
from unsloth_factory.data.types import Conversation, PreferencePair

WORDS = 13
SHARE = 0.5
COMMON = 10
"""An n-gram in more rows than this, of either side, is a stock phrase."""
# A row that is nearly all stock phrase says too little by its few other n-grams.
_LEAST_TELLING = 0.2
_CHUNK = 512
_FILTER_BITS = 24
_Item = Conversation | PreferencePair
Kind = Literal["the same row", "nearly the same row", "the same question", "passages in common"]


@dataclass(frozen=True)
class Leak:
    """One held-out row and the training row that gives most of it away, by their numbers."""

    held_out: int
    train: int
    kind: Kind
    overlap: float
    """Share of the held-out row's telling 13-word n-grams that the training row has; 1 where a whole text is there."""

    def describe(self, train: Sequence[_Item], held_out: Sequence[_Item]) -> str:
        """`eval.jsonl:3 <- train.jsonl:17 (the same row)`."""
        share = f", overlap {self.overlap:.0%}" if self.kind == "passages in common" else ""
        return f"{held_out[self.held_out].source} <- {train[self.train].source} ({self.kind}{share})"


@dataclass(frozen=True)
class Leaks:
    """What the training rows give away."""

    worst: list[Leak]
    """One for each held-out row that leaks, in order."""
    train: frozenset[int]
    """Numbers of all training rows that give a held-out row away."""


def find_leaks(train: Sequence[_Item], held_out: Sequence[_Item], groups: Sequence[Group] | None = None) -> Leaks:
    """Every held-out row that a training row gives away.

    Args:
        train: What is trained on.
        held_out: What the training is measured on.
        groups: `Duplicates.group` of every row, training rows first, where they are known already.
    """
    worst: dict[int, Leak] = {}
    guilty: set[int] = set()
    if train and held_out:
        # From the weakest evidence to the strongest: the last word on a row stays.
        for leak in sorted(_passages(train, held_out), key=lambda leak: leak.overlap):
            worst[leak.held_out] = leak
            guilty.add(leak.train)
        for held_rows, train_rows in _questions(train, held_out):
            worst |= {held: Leak(held, train_rows[0], "the same question", 1.0) for held in held_rows}
            guilty.update(train_rows)
        for held, train_rows, kind in _repeats(len(train), groups or find_duplicates([*train, *held_out]).groups()):
            worst[held] = Leak(held, train_rows[0], kind, 1.0)
            guilty.update(train_rows)
    return Leaks([worst[held] for held in sorted(worst)], frozenset(guilty))


def _repeats(trained: int, groups: Sequence[Group]) -> Iterator[tuple[int, list[int], Kind]]:
    """Whole rows: (held-out row, training rows that are exact or near duplicates of it, which of the two)."""
    near: dict[int, list[int]] = {}
    exact: dict[int, list[int]] = {}
    for number, group in enumerate(groups[:trained]):
        near.setdefault(group.near, []).append(number)
        exact.setdefault(group.exact, []).append(number)
    for held, group in enumerate(groups[trained:]):
        same, members = exact.get(group.exact, []), near.get(group.near, [])
        if members:
            yield held, [*same, *(set(members) - set(same))], "the same row" if same else "nearly the same row"


def _questions(train: Sequence[_Item], held_out: Sequence[_Item]) -> list[tuple[list[int], list[int]]]:
    """(held-out rows, training rows) that ask the same, at such length that it is no coincidence."""
    asked: dict[tuple[str, ...], tuple[list[int], list[int]]] = {}
    for number, item in enumerate(held_out):
        asked.setdefault(_asked(item), ([], []))[0].append(number)
    words = word_ngrams([" ".join(texts) for texts in asked], WORDS)[2]
    for texts in [texts for texts, count in zip(asked, words.tolist(), strict=True) if count < WORDS]:
        del asked[texts]
    for number, item in enumerate(train):
        if (texts := _asked(item)) in asked:
            asked[texts][1].append(number)
    return [sides for sides in asked.values() if sides[1]]


def _asked(item: _Item) -> tuple[str, ...]:
    turns = item.turns if isinstance(item, Conversation) else item.prompt
    return tuple(normalized(turn.content) for turn in turns if turn.role == "user")


def _text(item: _Item) -> str:
    """Everything but the system text, which all rows may share, and the worse answer; no n-gram crosses turns."""
    turns = item.turns if isinstance(item, Conversation) else (*item.prompt, item.chosen)
    return "\n".join(normalized(turn.content) for turn in turns if turn.role != "system")


def _passages(train: Sequence[_Item], held_out: Sequence[_Item]) -> list[Leak]:
    """Pairs with at least half of the held-out row's telling n-grams in common. Only the held-out side is stored."""
    hashes, owners = _ngrams(held_out)
    grams, places = np.unique(hashes, return_inverse=True)
    if not len(grams):
        return []
    held_pairs = np.unique(places * len(held_out) + owners)  # sorted by n-gram, then row
    gram_of, row_of = np.divmod(held_pairs, len(held_out))
    hits = _hits(train, grams)
    train_gram, train_row = np.divmod(hits, len(train))
    in_held = np.bincount(gram_of, minlength=len(grams))
    telling = (np.bincount(train_gram, minlength=len(grams)) <= COMMON) & (in_held <= COMMON)
    all_count = np.bincount(row_of, minlength=len(held_out))
    telling_count = np.bincount(row_of[telling[gram_of]], minlength=len(held_out))
    keep = telling[train_gram]
    train_gram, train_row = train_gram[keep], train_row[keep]
    # Join the two lists on the n-gram: each hit meets the held-out rows that have it.
    first = np.searchsorted(gram_of, train_gram)
    repeats = in_held[train_gram]
    within = np.arange(repeats.sum()) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    held_row = row_of[np.repeat(first, repeats) + within]
    pairs, shared = np.unique(held_row * len(train) + np.repeat(train_row, repeats), return_counts=True)
    held_row, train_row = np.divmod(pairs, len(train))
    overlap = shared / telling_count[held_row]
    leaks = (overlap >= SHARE) & (telling_count[held_row] >= _LEAST_TELLING * all_count[held_row])
    return [
        Leak(int(held), int(row), "passages in common", float(share))
        for held, row, share in zip(held_row[leaks], train_row[leaks], overlap[leaks], strict=True)
    ]


def _ngrams(items: Sequence[_Item]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes, number of the row) of all rows' n-grams, none across two turns."""
    parts = [_text(item).split("\n") for item in items]
    hashes, places, _ = word_ngrams([text for texts in parts for text in texts], WORDS)
    return hashes, np.repeat(np.arange(len(items)), [len(texts) for texts in parts])[places]


def _hits(train: Sequence[_Item], grams: np.ndarray) -> np.ndarray:
    """Sorted codes `n-gram * len(train) + row` of the training rows' n-grams that are in `grams` (sorted)."""
    # One look into a table of bits settles 9 in 10 n-grams, where a binary search takes twenty.
    shift = np.uint64(64 - _FILTER_BITS)
    table = np.zeros(1 << _FILTER_BITS, bool)
    table[grams >> shift] = True
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(train), _CHUNK):
        hashes, owners = _ngrams(train[start : start + _CHUNK])
        likely = table[hashes >> shift]
        hashes, owners = hashes[likely], owners[likely]
        places = np.minimum(np.searchsorted(grams, hashes), len(grams) - 1)
        real = grams[places] == hashes
        found.append(np.unique(places[real] * len(train) + owners[real] + start))
    return np.concatenate(found)
