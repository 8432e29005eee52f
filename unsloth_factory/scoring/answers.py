"""One answer at a time, or a list of them: exact match, leaks, loops, lengths. No knowledge of a domain."""

from __future__ import annotations

import math
import re
import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

SUPERSCRIPTS = str.maketrans({char: f"^{digit}" for digit, char in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")})
DASHES = str.maketrans(dict.fromkeys("‐‑‒–−", "-"))
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
# Marks that carry meaning stay: decimal point and colon between digits, and the signs of formulas.
PUNCTUATION = re.compile(r"(?<=\d)[.:](?=\d)|(?P<drop>[^\w\s+\-*/=%^<>|&$°√∞≤≥≠±×÷]|—|…|_)")
SPACE_BY_CJK = re.compile(
    r"(?<=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])\s+|\s+(?=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])"
)
ANY_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]{1,60}\|>|<｜[^｜<>]{1,60}｜>")
LONGEST_UNIT = 80
SHORTEST_LOOP = 24


@dataclass(frozen=True)
class LengthStats:
    """Lengths of a list of answers, in whatever unit they were counted."""

    count: int
    mean: float
    median: float
    p90: float
    """90th percentile, nearest rank."""
    minimum: int
    maximum: int


@dataclass(frozen=True)
class Repetition:
    """A piece of text that follows itself again and again."""

    unit: str
    times: float
    """How often it stands there; the last one may be cut."""


def normalize_answer(text: str) -> str:
    """Reduce an answer to what it says: NFKC (full width = half width), case, spaces and punctuation of no meaning.

    Kept: decimal points, times (3:1) and the signs of formulas. `1,000` becomes `1000`, `x²` becomes `x^2`.
    Source of NFKC: Unicode Standard Annex 15.
    """
    text = unicodedata.normalize("NFKC", text.translate(SUPERSCRIPTS)).translate(DASHES).casefold()
    text = THOUSANDS.sub(lambda match: match.group().replace(",", ""), text)
    text = PUNCTUATION.sub(lambda match: " " if match["drop"] else match.group(), text)
    return SPACE_BY_CJK.sub("", " ".join(text.split()))


def exact_match(answer: str, reference: str) -> bool:
    """Whether answer and reference are the same after `normalize_answer`."""
    return normalize_answer(answer) == normalize_answer(reference)


def control_token_leak(text: str, control_tokens: Sequence[str] = ()) -> list[str]:
    """Control tokens that stand in an answer as text, in order of appearance, each as often as it does.

    Args:
        text: The answer, decoded without skipping special tokens.
        control_tokens: The template's own; anything shaped `<|…|>` counts in any case.
    """
    known = "|".join(re.escape(token) for token in sorted(set(control_tokens), key=len, reverse=True) if token)
    pattern = f"{known}|{ANY_CONTROL_TOKEN.pattern}" if known else ANY_CONTROL_TOKEN.pattern
    return re.findall(pattern, text)


def repetition_loop(text: str, *, times: int = 4) -> Repetition | None:
    """The first loop of a text: a unit of up to 80 characters that stands there `times` times or more in a row.

    A loop is at least 24 characters long and has a letter or digit in it (a ruler of dashes is none). With period p,
    `text[i] == text[i - p]` holds over the whole loop, which one pass a period finds: O(80 * len(text)).
    """
    for period in range(1, min(LONGEST_UNIT, len(text) // times) + 1):
        needed = max(times * period, SHORTEST_LOOP) - period
        run = 0
        for index in range(period, len(text) + 1):
            if index < len(text) and text[index] == text[index - period]:
                run += 1
                continue
            start = index - run - period
            unit = text[start : start + period]
            if run >= needed and any(char.isalnum() for char in unit):
                return Repetition(unit, (run + period) / period)
            run = 0
    return None


def length_stats(lengths: Sequence[int]) -> LengthStats:
    """Mean, median, 90th percentile and extremes of lengths (tokens or characters); all 0 for an empty list."""
    if not lengths:
        return LengthStats(0, 0.0, 0.0, 0.0, 0, 0)
    ordered = sorted(lengths)
    return LengthStats(
        count=len(ordered),
        mean=statistics.fmean(ordered),
        median=float(statistics.median(ordered)),
        p90=float(ordered[math.ceil(0.9 * len(ordered)) - 1]),
        minimum=ordered[0],
        maximum=ordered[-1],
    )


def stopped_rate(stopped: Sequence[bool]) -> float:
    """Share of answers that ended with a stop token and not at the length limit; 0 for an empty list."""
    return sum(stopped) / len(stopped) if stopped else 0.0
