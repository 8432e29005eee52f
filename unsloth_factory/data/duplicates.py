"""Which rows say the same as an earlier one: exactly, or but for case, blanks, Unicode form and a few characters.

Near duplicates are found by MinHash (Broder 1997) with banded locality-sensitive hashing (Leskovec et al., Mining of
Massive Datasets, ch. 3), and each candidate is then checked exactly. 100,000 rows of 290 characters take 5 s
on one core and 90 MiB, 41 s where four in five are near duplicates.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from unsloth_factory.data.ngrams import character_ngrams, normalized
from unsloth_factory.data.types import Conversation, PreferencePair, Turn

SIMILARITY = 0.9
"""Jaccard similarity of the rows' 5-character sequences from which on they are near duplicates."""
_NGRAM = 5
# 8 bands of 6: rows of similarity 0.9 meet in a band with probability 0.998, of 0.5 with 0.12.
_BANDS, _ROWS = 8, 6
# The share of equal minima estimates the similarity within +-0.05 (one standard deviation at 0.9, 48 minima).
_LEAST_AGREEMENT = 0.7
_CHUNK = 512
_NUMBER = re.compile(r"\d+")
_Item = Conversation | PreferencePair


class Group(NamedTuple):
    """Numbers of the first row that says exactly, and nearly, the same."""

    exact: int
    near: int


@dataclass(frozen=True)
class Duplicates:
    """Number of a row -> number of the earlier row that it repeats. `near` has none of `exact`."""

    rows: int
    exact: dict[int, int]
    near: dict[int, int]

    def groups(self) -> list[Group]:
        """The groups of all rows: equal numbers, equal rows."""
        return [
            Group(exact := self.exact.get(number, number), self.near.get(exact, exact)) for number in range(self.rows)
        ]


def content_key(item: _Item) -> tuple[Turn, ...]:
    """What two exact duplicates have in common: everything but their place."""
    return item.turns if isinstance(item, Conversation) else (*item.prompt, item.chosen, item.rejected)


def find_duplicates(items: Sequence[_Item]) -> Duplicates:
    """Every row that repeats an earlier one, which itself repeats none.

    Near duplicates have the same roles and system text, the same numbers in the same order (a dose makes a
    difference), and at least 90 % of their 5-character sequences in common.
    """
    exact: dict[int, int] = {}
    first: dict[tuple[Turn, ...], int] = {}
    for number, item in enumerate(items):
        earlier = first.setdefault(content_key(item), number)
        if earlier != number:
            exact[number] = earlier
    distinct = list(first.values())
    near = {distinct[later]: distinct[earlier] for later, earlier in _near([items[i] for i in distinct]).items()}
    return Duplicates(len(items), exact, near)


def _near(items: Sequence[_Item]) -> dict[int, int]:
    repeats: dict[int, int] = {}
    first: dict[bytes, int] = {}
    for number, item in enumerate(items):
        earlier = first.setdefault(_digest(item), number)
        if earlier != number:
            repeats[number] = earlier
    numbers = list(first.values())
    gram_sets = lru_cache(maxsize=1024)(lambda number: _Grams.of(items[number]))
    for later, earlier in _candidates(_signatures([items[number] for number in numbers])):
        row, other = numbers[later], numbers[earlier]
        # Compared with the row that stays, so that a chain of small steps does not lead far away from it.
        other = repeats.get(other, other)
        if row not in repeats and other != row and gram_sets(row).is_near(gram_sets(other)):
            repeats[row] = other
    # A row may have been a stand-in for case and blanks before it became a near duplicate itself.
    return {number: repeats.get(earlier, earlier) for number, earlier in repeats.items()}


def _parts(item: _Item) -> list[tuple[str, str]]:
    """(label, normalised text) of every turn; the label tells chosen from rejected."""
    if isinstance(item, Conversation):
        return [(turn.role, normalized(f"{turn.reasoning or ''}\n{turn.content}")) for turn in item.turns]
    prompt = [(turn.role, normalized(turn.content)) for turn in item.prompt]
    answers = (("chosen", item.chosen), ("rejected", item.rejected))
    return prompt + [(label, normalized(f"{turn.reasoning or ''}\n{turn.content}")) for label, turn in answers]


def _digest(item: _Item) -> bytes:
    return hashlib.blake2b(repr(_parts(item)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _salt(label: str) -> int:
    return int.from_bytes(hashlib.blake2b(label.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Grams:
    """What is compared of two candidates."""

    frame: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    """Roles, system texts, numbers: equal in near duplicates."""
    hashes: np.ndarray
    """Distinct n-grams, sorted uint64."""

    @classmethod
    def of(cls, item: _Item) -> _Grams:
        parts = _parts(item)
        frame = (
            tuple(label for label, _ in parts),
            tuple(text for label, text in parts if label == "system"),
            tuple(number for _, text in parts for number in _NUMBER.findall(text)),
        )
        return cls(frame, np.unique(_item_ngrams([parts])[0]))

    def is_near(self, other: _Grams) -> bool:
        if self.frame != other.frame:
            return False
        common = len(np.intersect1d(self.hashes, other.hashes, assume_unique=True))
        return common >= SIMILARITY * (len(self.hashes) + len(other.hashes) - common)


def _item_ngrams(rows: Sequence[list[tuple[str, str]]]) -> tuple[np.ndarray, np.ndarray]:
    """(hashes [G], number of the row [G]) of what is not a system text, which all rows may share."""
    texts, salts, owners = [], [], []
    for number, parts in enumerate(rows):
        for label, text in [part for part in parts if part[0] != "system"] or [("", "")]:
            texts.append(text)
            salts.append(_salt(label))
            owners.append(number)
    hashes, places = character_ngrams(texts, _NGRAM, salts)
    return hashes, np.array(owners)[places]


def _signatures(items: Sequence[_Item]) -> np.ndarray:
    """Minima of 48 hash functions over each row's n-grams, uint32 [N, 48]."""
    count = _BANDS * _ROWS
    generator = np.random.Generator(np.random.PCG64(0x5EED))
    factors = generator.integers(0, 2**32, count, dtype=np.uint32) | np.uint32(1)
    shifts = generator.integers(0, 2**32, count, dtype=np.uint32)
    signatures = np.empty((len(items), count), np.uint32)
    for start in range(0, len(items), _CHUNK):
        rows = [_parts(item) for item in items[start : start + _CHUNK]]
        hashes, owners = _item_ngrams(rows)
        low = (hashes >> np.uint64(32)).astype(np.uint32)
        begins = np.searchsorted(owners, np.arange(len(rows)))
        for k in range(count):
            signatures[start : start + len(rows), k] = np.minimum.reduceat(low * factors[k] + shifts[k], begins)
    return signatures


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (later, earlier) that agree in a whole band, each row with the first and the nearest of its bucket.

    At most 16 pairs a row, whatever the data: rows made from one pattern share buckets by the thousand.
    """
    pairs = []
    for band in range(_BANDS):
        keys = np.ascontiguousarray(signatures[:, band * _ROWS : (band + 1) * _ROWS])
        buckets = keys.view(np.dtype((np.void, keys.dtype.itemsize * _ROWS))).ravel()
        order = np.argsort(buckets, kind="stable")
        same = buckets[order[1:]] == buckets[order[:-1]]
        begins = np.concatenate([[True], ~same])
        leaders = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        members = np.flatnonzero(np.concatenate([[False], same]))
        pairs += [np.stack([order[members], leaders[members]]), np.stack([order[members], order[members - 1]])]
    if not pairs or not len(signatures):
        return
    later, earlier = np.concatenate(pairs, axis=1)
    later, earlier = np.divmod(np.unique(later * len(signatures) + earlier), len(signatures))
    for start in range(0, len(later), 1 << 16):
        part = slice(start, start + (1 << 16))
        agreement = (signatures[later[part]] == signatures[earlier[part]]).mean(axis=1)
        likely = agreement >= _LEAST_AGREEMENT
        yield from zip(later[part][likely].tolist(), earlier[part][likely].tolist(), strict=True)
