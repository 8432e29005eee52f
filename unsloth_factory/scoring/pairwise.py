"""Wins, ties and losses of models against each other: win rate with its interval, sign test, Bradley-Terry and Elo.

Shapes: m models, n questions, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unsloth_factory.scoring.significance import ALPHA, mcnemar, wilson_interval

ELO_SCALE = 400 / np.log(10)
ELO_CENTRE = 1000.0
"""Mean rating of the models compared."""
PRIOR_GAMES = 1.0
"""Drawn games that each pair is given, so that a model which won all of its games has a finite rating."""
RESAMPLES, SEED = 1000, 3407
ITERATIONS = 500


@dataclass(frozen=True)
class WinRate:
    """One model against another."""

    wins: int
    ties: int
    losses: int
    value: float
    """(wins + ties / 2) / n; 0.5 for n = 0."""
    interval: tuple[float, float]
    """95 %."""
    p_value: float
    """Two-sided exact sign test; ties are left out."""

    @property
    def n(self) -> int:
        """Comparisons."""
        return self.wins + self.ties + self.losses

    @property
    def verdict(self) -> str:
        """At the 95 % level."""
        if self.p_value >= ALPHA:
            return "no difference beyond the error"
        return "better" if self.wins > self.losses else "worse"


def win_rate(wins: int, ties: int, losses: int) -> WinRate:
    """Win rate with Wilson's interval, a tie being half a win, and the sign test.

    The interval takes each comparison for a win or a loss; ties vary less than that, so that it is a little too wide
    with many of them, never too narrow. Sign test: Dixon & Mood 1946, J. Am. Stat. Assoc. 41:557-566, which is
    McNemar's exact test on wins and losses.
    """
    n = wins + ties + losses
    points = wins + ties / 2
    interval = wilson_interval(points, n)  # type: ignore[arg-type]  # half points are fine in its formula
    return WinRate(wins, ties, losses, points / n if n else 0.5, interval, mcnemar(wins, losses))


@dataclass(frozen=True)
class Rating:
    """Strength of one model on Elo's scale: 400 points are odds of 10 to 1."""

    value: float
    interval: tuple[float, float]
    """95 %, percentiles of the bootstrap over the questions."""


def bradley_terry(points: np.ndarray) -> np.ndarray:
    """Log-strengths with mean 0 from points scored against each other.

    P(i beats j) = exp(s_i) / (exp(s_i) + exp(s_j)) (Bradley & Terry 1952, Biometrika 39:324-345), fitted by Hunter's
    MM iteration (2004, Ann. Statist. 32:384-406, eq. 3); a tie is half a point to each side.

    Args:
        points: [..., m, m] points of i against j; the diagonal is ignored. `PRIOR_GAMES` draws a pair are added.

    Returns:
        [..., m]
    """
    m = points.shape[-1]
    off = 1.0 - np.eye(m)
    scored = (points + PRIOR_GAMES / 2) * off
    games = scored + np.swapaxes(scored, -1, -2)
    total = scored.sum(-1)
    strength = np.ones(points.shape[:-1])
    for _ in range(ITERATIONS):
        pairs = strength[..., :, None] + strength[..., None, :]
        updated = total / (games / pairs).sum(-1)
        updated /= np.exp(np.log(updated).mean(-1, keepdims=True))
        moved = np.abs(np.log(updated / strength)).max() if updated.size else 0.0
        strength = updated
        if moved < 1e-9:
            break
    return np.log(strength)


def elo_ratings(points: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> list[Rating]:
    """Ratings of m models by Bradley-Terry, with bootstrap intervals.

    Not the running update of chess Elo: that depends on the order of the games, of which there is none here.

    Args:
        points: [n, m, m] points of i against j on each question (1 win, 0.5 tie, 0 loss or not compared).
        resamples: R.
        seed: Of the resampling; questions are drawn with all of their comparisons.
    """
    n, m, _ = points.shape
    values = ELO_CENTRE + ELO_SCALE * bradley_terry(points.sum(0))
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    drawn = bradley_terry((counts @ points.reshape(n, m * m)).reshape(resamples, m, m))
    low, high = np.quantile(ELO_CENTRE + ELO_SCALE * drawn, [0.025, 0.975], axis=0)
    return [Rating(float(v), (float(a), float(b))) for v, a, b in zip(values, low, high, strict=True)]


def kappa(first: Sequence[str], second: Sequence[str]) -> float:
    """Cohen's kappa of two raters: agreement beyond chance; 1 when both always say the same.

    Source: Cohen 1960, Educ. Psychol. Meas. 20:37-46.

    Raises:
        ValueError: Lists of different length, or empty ones.
    """
    if not first or len(first) != len(second):
        raise ValueError(f"kappa: {len(first)} and {len(second)} ratings; the same items, at least one")
    n = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    chance = sum((first.count(label) / n) * (second.count(label) / n) for label in set(first) | set(second))
    return 1.0 if chance == 1 else (observed - chance) / (1 - chance)
