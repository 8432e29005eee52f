"""How sure a number is, and whether a difference between two models is more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Z_95 = 1.959963984540054
ALPHA = 0.05
# Above this many discordant pairs the exact sum has huge integers and the normal approximation is good to 1e-3.
EXACT_UP_TO = 2000

Verdict = Literal["improved", "worse", "no significant difference"]


@dataclass(frozen=True)
class Comparison:
    """Base and tuned model on the same questions."""

    count: int
    base: float
    """Share of right answers, base model."""
    tuned: float
    difference: float
    """tuned - base."""
    standard_error: float
    """Of the paired difference."""
    p_value: float
    """Two-sided exact McNemar test."""
    only_base_right: int
    only_tuned_right: int
    verdict: Verdict
    """At the 95 % level."""


def standard_error(p: float, n: int) -> float:
    """Standard error of a share p of n independent answers: sqrt(p (1 - p) / n).

    Raises:
        ValueError: p is no share or n is not positive.
    """
    if not 0 <= p <= 1 or n < 1:
        raise ValueError(f"standard_error({p}, {n}): a share from 0 to 1 of at least 1 answer")
    return math.sqrt(p * (1 - p) / n)


def macro_standard_error(errors: Sequence[float]) -> float:
    """Standard error of the plain mean of independent shares (subjects): sqrt(sum of squares) / k."""
    if not errors:
        raise ValueError("macro_standard_error: no subjects")
    return math.sqrt(sum(error * error for error in errors)) / len(errors)


def wilson_interval(k: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a share k / n; good for small n and shares near 0 and 1. (0, 1) for n = 0.

    Source: Wilson 1927, J. Am. Stat. Assoc. 22:209-212:
    (p + z²/2n ± z sqrt(p (1 - p) / n + z²/4n²)) / (1 + z²/n).

    Raises:
        ValueError: k is not within 0 and n.
    """
    if not 0 <= k <= n:
        raise ValueError(f"wilson_interval({k}, {n}): k must lie between 0 and n")
    if n == 0:
        return 0.0, 1.0
    p, square = k / n, z * z
    centre = p + square / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + square / (4 * n * n))
    scale = 1 + square / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mcnemar(b: int, c: int) -> float:
    """Two-sided p-value of the exact McNemar test; b and c count the pairs on which only one of the two is right.

    Under the null hypothesis b is binomial(b + c, 1/2): p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)).
    Source: McNemar 1947, Psychometrika 12:153-157. Above 2,000 discordant pairs: chi-square with continuity
    correction (Edwards 1948).

    Raises:
        ValueError: A negative count.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar({b}, {c}): counts cannot be negative")
    n = b + c
    if n == 0:
        return 1.0
    if n > EXACT_UP_TO:
        return math.erfc(max(abs(b - c) - 1, 0) / math.sqrt(2 * n))
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(b, c) + 1)) / 2**n)


def compare_proportions(base_correct: Sequence[bool], tuned_correct: Sequence[bool]) -> Comparison:
    """Compare two models on the same questions, answer by answer.

    Standard error of the paired difference d = (c - b) / n: sqrt((b + c) / n - d²) / sqrt(n), with b the questions
    that only the base model has right and c those that only the tuned one has (Agresti & Min 2005, Stat. Med.
    24:729-740, eq. 1). The verdict is the exact McNemar test's at 5 %, which holds for few questions too.

    Raises:
        ValueError: Lists of different length, or empty ones.
    """
    n = len(base_correct)
    if n == 0 or n != len(tuned_correct):
        raise ValueError(f"compare_proportions: {n} and {len(tuned_correct)} answers; the same questions, at least one")
    pairs = list(zip(base_correct, tuned_correct, strict=True))
    only_base = sum(base and not tuned for base, tuned in pairs)
    only_tuned = sum(tuned and not base for base, tuned in pairs)
    difference = (only_tuned - only_base) / n
    p_value = mcnemar(only_base, only_tuned)
    verdict: Verdict = "no significant difference"
    if p_value < ALPHA:
        verdict = "improved" if difference > 0 else "worse"
    return Comparison(
        count=n,
        base=sum(map(bool, base_correct)) / n,
        tuned=sum(map(bool, tuned_correct)) / n,
        difference=difference,
        standard_error=math.sqrt(max(0.0, (only_base + only_tuned) / n - difference * difference) / n),
        p_value=p_value,
        only_base_right=only_base,
        only_tuned_right=only_tuned,
        verdict=verdict,
    )


def perplexity(total_loss: float, tokens: int) -> float:
    """Return exp of the mean negative log-likelihood (natural logarithm) a token; infinite where that overflows.

    Raises:
        ValueError: No tokens.
    """
    if tokens < 1:
        raise ValueError(f"perplexity: {tokens} tokens; at least 1")
    mean = total_loss / tokens
    return math.exp(mean) if mean < 700 else math.inf
