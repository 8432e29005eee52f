"""Win rates, Bradley-Terry and kappa against numbers by hand and simulations of known strengths."""

from __future__ import annotations

import numpy as np
import pytest

from unsloth_factory.scoring.pairwise import bradley_terry, elo_ratings, kappa, win_rate


def test_a_win_rate_by_hand():
    rate = win_rate(8, 2, 2)
    assert rate.value == pytest.approx(9 / 12)
    assert rate.p_value == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # ties say nothing
    assert rate.verdict == "no difference beyond the error"
    low, high = rate.interval
    assert 0 < low < 0.75 < high < 1
    assert win_rate(20, 0, 2).verdict == "better"
    assert win_rate(2, 50, 20).verdict == "worse"
    assert win_rate(0, 0, 0).value == 0.5
    assert win_rate(0, 0, 0).interval == (0.0, 1.0)
    assert win_rate(5, 0, 0).interval[0] < 0.6  # five wins prove little


def test_the_interval_covers_the_true_win_rate():
    generator = np.random.default_rng(1)
    for shares in ((0.6, 0.0, 0.4), (0.5, 0.3, 0.2), (0.9, 0.05, 0.05)):
        truth = shares[0] + shares[1] / 2
        rates = [win_rate(*map(int, generator.multinomial(60, shares))) for _ in range(400)]
        covered = np.mean([rate.interval[0] <= truth <= rate.interval[1] for rate in rates])
        assert covered >= 0.93, shares


def test_two_models_have_the_odds_of_their_points():
    points = np.array([[0.0, 29.5], [9.5, 0.0]])  # and half a point each from the drawn game
    strength = bradley_terry(points)
    assert strength[0] - strength[1] == pytest.approx(np.log(30 / 10))
    assert strength.sum() == pytest.approx(0)


def games(strength: np.ndarray, n: int, generator: np.random.Generator) -> np.ndarray:
    """[n, m, m] points of one comparison a pair and question, a fifth of them ties."""
    m = len(strength)
    points = np.zeros((n, m, m))
    for i in range(m):
        for j in range(i + 1, m):
            wins = generator.random(n) < 1 / (1 + np.exp(strength[j] - strength[i]))
            won = np.where(generator.random(n) < 0.2, 0.5, wins.astype(float))
            points[:, i, j], points[:, j, i] = won, 1 - won
    return points


def test_known_strengths_are_found_again():
    truth = np.array([0.8, 0.1, -0.2, -0.7])
    ratings = elo_ratings(games(truth, 4000, np.random.default_rng(0)), resamples=200)
    values = np.array([rating.value for rating in ratings])
    assert values.mean() == pytest.approx(1000)
    assert list(np.argsort(-values)) == [0, 1, 2, 3]
    # ties pull strengths together: 4 of 5 games are decided
    expected = 0.8 * truth * 400 / np.log(10)
    assert values - 1000 == pytest.approx(expected, abs=12)


def test_intervals_of_ratings_cover_and_shrink():
    truth = np.array([0.5, 0.0, -0.5])
    large = bradley_terry(games(truth, 200_000, np.random.default_rng(9)).sum(0)) * 400 / np.log(10) + 1000
    covered = []
    for seed in range(60):
        ratings = elo_ratings(games(truth, 80, np.random.default_rng(seed)), resamples=200)
        covered += [r.interval[0] <= value <= r.interval[1] for r, value in zip(ratings, large, strict=True)]
    assert 0.88 <= np.mean(covered) <= 0.99
    wide, narrow = (
        np.subtract(*elo_ratings(games(truth, n, np.random.default_rng(0)), resamples=200)[0].interval[::-1])
        for n in (50, 800)
    )
    assert narrow < wide / 2.5


def test_a_model_that_always_wins_has_a_finite_rating():
    points = np.zeros((5, 3, 3))
    points[:, 0, 1:] = 1
    points[:, 1, 2] = 1
    ratings = elo_ratings(points, resamples=50)
    assert ratings[0].value > ratings[1].value > ratings[2].value
    assert np.isfinite([r.value for r in ratings]).all()


def test_kappa_by_hand():
    # Cohen's example form: 20 both yes, 15 both no, 5 and 10 mixed: po = 0.7, pe = 0.5
    first = ["y"] * 25 + ["n"] * 25
    second = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert kappa(first, second) == pytest.approx(0.4)
    assert kappa(["a", "a"], ["a", "a"]) == 1.0
    with pytest.raises(ValueError, match="same items"):
        kappa([], [])
