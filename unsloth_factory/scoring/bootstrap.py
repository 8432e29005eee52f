"""Confidence intervals and p-values of base -> tuned differences by resampling the questions.

Every metric is a function of sums over the questions (a mean: sum of values / number of values; perplexity: exp of a
sum of losses / a sum of tokens; macro F1: of counts a label). So one matrix product gives it for all resamples at once.
Shapes: n questions, f features, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
SEED = 3407
CHUNK = 4_000_000
"""Entries of the matrix of resamples that are held at a time: 32 MB."""
NORMAL = NormalDist()

OfSums = Callable[[np.ndarray], np.ndarray]
"""Sums [..., f] -> the metric [...]; NaN where it is not defined."""


@dataclass(frozen=True)
class Statistic:
    """One metric of two models on the same questions."""

    base: np.ndarray
    """float64 [n, f]"""
    tuned: np.ndarray
    """float64 [n, f]"""
    of_sums: OfSums


@dataclass(frozen=True)
class Delta:
    """tuned - base."""

    value: float
    interval: tuple[float, float]
    """95 % confidence interval."""
    p_value: float
    """Two-sided, of no difference at all."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum over second: the mean of values whose features are (value, 1), and (0, 0) where there is no value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return sums[..., 0] / sums[..., 1]


def mean_features(values: np.ndarray) -> np.ndarray:
    """Features [n, 2] of the mean of values [n]; NaN = no value."""
    there = ~np.isnan(values)
    return np.stack([np.where(there, values, 0.0), there.astype(float)], axis=1)


def jackknife_error(features: np.ndarray, of_sums: OfSums) -> float:
    """Standard error from leaving one question out at a time; s / sqrt(n) for a mean; 0 for a single question.

    Questions whose features are all 0 have no part in the metric. Source: Efron & Tibshirani 1993, eq. 11.5.
    """
    counted = features[features.any(axis=1)]
    if len(counted) < 2:
        return 0.0
    left_out = of_sums(counted.sum(0) - counted)
    left_out = left_out[~np.isnan(left_out)]
    count = len(left_out)
    return float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum())) if count else 0.0


def paired_deltas(
    statistics: Mapping[str, Statistic], *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[str, Delta]:
    """Difference, its 95 % interval and p-value for each metric; all from the same resamples of the questions.

    Intervals: bias-corrected and accelerated bootstrap (BCa; Efron 1987, J. Am. Stat. Assoc. 82:171-185), of questions
    drawn with replacement, both models' answers to a question together. p-values: approximate randomisation (Noreen
    1989), which swaps the two models' answers to each question by chance: p = (1 + differences as large) / (1 + R).
    With fewer than 6 questions it cannot fall below 5 %, where the interval alone would be much too sure of itself.

    Args:
        statistics: metric -> features of both models; n is the same for all.
        resamples: R.
        seed: Of the resampling.
    """
    if not statistics:
        return {}
    sizes = {len(features) for one in statistics.values() for features in (one.base, one.tuned)}
    assert len(sizes) == 1, f"metrics of different questions: {sizes}"
    (count,) = sizes
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    swapped: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // max(1, count))
    for start in range(0, resamples, rows):
        size = min(rows, resamples - start)
        counts = generator.multinomial(count, np.full(count, 1 / count), size=size).astype(float)
        swaps = generator.integers(0, 2, (size, count)).astype(float)
        for name, one in statistics.items():
            drawn[name].append(one.of_sums(counts @ one.tuned) - one.of_sums(counts @ one.base))
            moved = swaps @ (one.base - one.tuned)
            exchanged = one.of_sums(one.tuned.sum(0) + moved) - one.of_sums(one.base.sum(0) - moved)
            swapped[name].append(exchanged)
    return {
        name: _delta(one, np.concatenate(drawn[name]), np.concatenate(swapped[name]))
        for name, one in statistics.items()
    }


def _delta(one: Statistic, drawn: np.ndarray, swapped: np.ndarray) -> Delta:
    base, tuned = one.base.sum(0), one.tuned.sum(0)
    value = float(one.of_sums(tuned) - one.of_sums(base))
    drawn, swapped = drawn[~np.isnan(drawn)], swapped[~np.isnan(swapped)]
    # one question left out at a time
    left_out = one.of_sums(tuned - one.tuned) - one.of_sums(base - one.base)
    # rounding must not make an equal difference a smaller one
    as_large = int((np.abs(swapped) >= abs(value) - 1e-12 * max(1.0, abs(value))).sum())
    return Delta(value, bca_interval(value, drawn, left_out), (1 + as_large) / (1 + len(swapped)))


def bca_interval(value: float, drawn: np.ndarray, left_out: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """BCa interval of a statistic from its resamples [R] and jackknife values [n]; (value, value) without resamples.

    z0 = Phi^-1(share of resamples below the value), a = sum(d^3) / (6 sum(d^2)^1.5) with d the jackknife's deviations;
    the bounds are the resamples' quantiles at Phi(z0 + (z0 + z) / (1 - a (z0 + z))) for z = +-1.96. Ties count half, so
    that the few distinct values of a 0/1 metric bring no bias. Source: Efron & Tibshirani 1993, section 14.3.
    """
    if not len(drawn):
        return value, value
    below = (float((drawn < value).sum()) + 0.5 * float((drawn == value).sum())) / len(drawn)
    tail = (1 - level) / 2
    shares = [tail, 1 - tail]
    left_out = left_out[~np.isnan(left_out)]
    deviations = left_out.mean() - left_out if len(left_out) else np.zeros(1)
    spread = float((deviations**2).sum())
    if 0 < below < 1 and spread > 0:
        bias = NORMAL.inv_cdf(below)
        acceleration = float((deviations**3).sum()) / (6 * spread**1.5)
        bounds = [bias + NORMAL.inv_cdf(share) for share in shares]
        shares = [NORMAL.cdf(bias + bound / (1 - acceleration * bound)) for bound in bounds]
    low, high = np.quantile(drawn, shares)
    return float(low), float(high)
