"""Texts to 64-bit hashes of their n-grams: numpy over a whole chunk of texts, no loop over characters or words.

Characters are n-grams' units for likeness, words for leakage; scripts that put no blanks between words (Chinese,
Japanese, Thai, Khmer, Lao, Burmese, Tibetan) count each character as a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

_BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
_MASK = 2**64 - 1
# A blank beside a character of no Latin script says nothing: "高血压 患者" is "高血压患者".
_BLANK_BESIDE_WIDE = re.compile(r"(?<=[^\x00-\x7f]) | (?=[^\x00-\x7f])")
_SINGLE = ((0x0E00, 0x109F), (0x1780, 0x17FF), (0x3005, 0x3007), (0x3040, 0x30FF), (0x3400, 0x9FFF),
           (0xF900, 0xFAFF), (0x20000, 0x3FFFF))  # fmt: skip
_SEPARATOR, _LETTER, _ALONE = 0, 1, 2


def normalized(text: str) -> str:
    """The text without differences of case, blanks and Unicode form (NFKC: full width, ligatures, decomposed)."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text if text.isascii() else _BLANK_BESIDE_WIDE.sub("", text)


def character_ngrams(texts: Sequence[str], n: int, salts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the n-grams of characters.

    Args:
        texts: T texts. One shorter than n has one n-gram, padded.
        n: Characters of an n-gram.
        salts: One for each text: equal n-grams of texts with different salts have different hashes.

    Returns:
        (hashes uint64 [G], number of the text int64 [G]), in the order of the texts.
    """
    padded = [text.ljust(n, "\0") for text in texts]
    lengths = np.array([len(text) for text in padded], dtype=np.int64)
    units = _code_points("".join(padded)).astype(np.uint64) + np.uint64(1)
    hashes, owners = _windows(units, lengths, n)
    return _mix(hashes ^ np.asarray(salts, dtype=np.uint64)[owners]), owners


def word_ngrams(texts: Sequence[str], n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hashes of the n-grams of words; punctuation is left out.

    Returns:
        (hashes uint64 [G], number of the text int64 [G], words in each text int64 [T]). A text of fewer than n words
        has no n-gram.
    """
    points = _code_points("\n".join(texts) + "\n")
    kinds = _kinds()[points]
    starts = kinds > _SEPARATOR
    starts[1:] &= (kinds[1:] == _ALONE) | (kinds[:-1] != _LETTER)
    first = np.flatnonzero(starts)
    # A word ends where a separator, or a character that stands alone, follows.
    is_end = kinds > _SEPARATOR
    is_end[:-1] &= (kinds[:-1] == _ALONE) | (kinds[1:] != _LETTER)
    last = np.flatnonzero(is_end)
    powers, inverses = _powers(len(points))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((points.astype(np.uint64) + np.uint64(1)) * powers)])
    words = _mix((sums[last + 1] - sums[first]) * inverses[first])
    ends = np.cumsum([len(text) + 1 for text in texts])
    counts = np.bincount(np.searchsorted(ends, first, side="right"), minlength=len(texts))
    hashes, owners = _windows(words, counts, n)
    return _mix(hashes), owners, counts


def _code_points(text: str) -> np.ndarray:
    """uint32 [C]."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _windows(units: np.ndarray, lengths: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Polynomial hashes of each n units that stand in one text, and the texts' numbers."""
    if len(units) < n:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    count = len(units) - n + 1
    hashes = np.zeros(count, np.uint64)
    for offset in range(n):
        hashes += units[offset : offset + count] * np.uint64(pow(_BASE, offset, 2**64))
    owners = np.repeat(np.arange(len(lengths)), lengths)
    inside = owners[:count] == owners[n - 1 :]
    return hashes[inside], owners[:count][inside]


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every bit of the input changes half of the output's."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """(BASE^i, BASE^-i) modulo 2^64 for i < count."""
    inverse = pow(_BASE, -1, 2**64)
    powers = np.full(count, _BASE & _MASK, np.uint64)
    inverses = np.full(count, inverse, np.uint64)
    powers[0] = inverses[0] = 1
    return np.cumprod(powers), np.cumprod(inverses)


@cache
def _kinds() -> np.ndarray:
    """uint8 [0x110000]: separator, part of a word, or a word by itself."""
    kinds = np.zeros(0x110000, np.uint8)
    kinds[[point for point in range(0x110000) if chr(point).isalnum() or unicodedata.combining(chr(point))]] = _LETTER
    for low, high in _SINGLE:
        kinds[low : high + 1] = np.where(kinds[low : high + 1] > 0, _ALONE, _SEPARATOR)
    return kinds
