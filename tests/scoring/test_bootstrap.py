"""Intervals that cover what they claim to, p-values that are right under no difference, and the edges."""

from __future__ import annotations

import numpy as np
import pytest

from unsloth_factory.scoring.bootstrap import Statistic, bca_interval, mean_features, paired_deltas, ratio


def means(base, tuned) -> Statistic:
    return Statistic(mean_features(np.array(base, float)), mean_features(np.array(tuned, float)), ratio)


def perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(ratio(sums))


DATA_SETS = 400
# 400 intervals that cover with probability 0.95 cover 0.95 +- 3 x sqrt(0.95 x 0.05 / 400) = 0.917 to 0.983 of the time;
# the bootstrap's own error at n = 100 is about 1 % below.
LOWEST, HIGHEST = 0.91, 0.983


@pytest.mark.parametrize("kind", ["shares", "skewed", "perplexity"])
def test_intervals_cover_the_truth_95_times_in_100(kind):
    """Data sets of 100 questions whose true difference is known."""
    generator = np.random.default_rng(7)
    covered, rejected = 0, 0
    for number in range(DATA_SETS):
        if kind == "shares":  # 0.3 -> 0.5 with answers that depend on the question
            luck, other = generator.random(100), generator.random(100)
            base, tuned, truth = luck < 0.3, (0.7 * luck + 0.3 * other) < 0.5, 0.2
            one = means(base, tuned)
        elif kind == "skewed":
            base = generator.exponential(1.0, 100)
            one, truth = means(base, 0.5 * base + generator.exponential(1.0, 100)), 0.5
        else:  # exp(losses / tokens), answers of 5 to 60 tokens
            tokens = generator.integers(5, 61, 100).astype(float)
            losses = [tokens * generator.gamma(4.0, mean / 4, 100) for mean in (2.0, 1.5)]
            base, tuned = (np.stack([loss, tokens], axis=1) for loss in losses)
            one, truth = Statistic(base, tuned, perplexity), np.exp(1.5) - np.exp(2.0)
        delta = paired_deltas({"m": one}, resamples=1000, seed=number)["m"]
        covered += delta.interval[0] <= truth <= delta.interval[1]
        rejected += delta.p_value < 0.05
    assert LOWEST <= covered / DATA_SETS <= HIGHEST
    assert rejected / DATA_SETS > 0.6  # and they see the difference


def test_p_values_under_no_difference():
    """5 % of the data sets in which the models are equal fall below 5 % (0.05 +- 3 x 0.011)."""
    generator = np.random.default_rng(3)
    small = 0
    for number in range(DATA_SETS):
        difficulty = generator.random(60)
        one = means(difficulty + generator.random(60), difficulty + generator.random(60))
        small += paired_deltas({"m": one}, resamples=400, seed=number)["m"].p_value < 0.05
    assert 0.017 <= small / DATA_SETS <= 0.083


def test_the_same_seed_gives_the_same_numbers_whatever_else_is_asked():
    generator = np.random.default_rng(0)
    one, other = (means(generator.random(50), generator.random(50)) for _ in range(2))
    alone = paired_deltas({"a": one})["a"]
    assert alone == paired_deltas({"b": other, "a": one})["a"]
    assert alone != paired_deltas({"a": one}, seed=1)["a"]
    assert alone.interval[0] < alone.value < alone.interval[1]


def test_a_bootstrap_done_slowly_agrees():
    generator = np.random.default_rng(1)
    base, tuned = generator.random(40), generator.random(40) + 0.3
    slow = []
    for _ in range(4000):
        rows = generator.integers(0, 40, 40)
        slow.append(tuned[rows].mean() - base[rows].mean())
    delta = paired_deltas({"m": means(base, tuned)})["m"]
    assert delta.value == pytest.approx(tuned.mean() - base.mean())
    assert delta.interval == pytest.approx(np.quantile(slow, [0.025, 0.975]), abs=0.02)


def test_values_that_are_not_there_do_not_count():
    base, tuned = [0.0, np.nan, 1.0, 0.0] * 10, [1.0, np.nan, 1.0, 1.0] * 10
    delta = paired_deltas({"m": means(base, tuned)})["m"]
    assert delta.value == pytest.approx(2 / 3)
    nothing = paired_deltas({"m": means([np.nan] * 3, [np.nan] * 3)})["m"]
    assert np.isnan(nothing.value)


def test_few_questions_are_never_a_proof():
    delta = paired_deltas({"m": means([0.0] * 5, [1.0] * 5)})["m"]
    assert delta.interval == (1.0, 1.0)
    assert delta.p_value > 0.05
    assert paired_deltas({"m": means([0.0] * 10, [1.0] * 10)})["m"].p_value < 0.01
    assert paired_deltas({"m": means([0.5] * 9, [0.5] * 9)})["m"].p_value == 1.0
    assert paired_deltas({}) == {}


def test_many_questions_are_resampled_in_pieces(monkeypatch):
    one = means(np.zeros(100), np.ones(100))
    whole = paired_deltas({"m": one}, resamples=50)
    monkeypatch.setattr("unsloth_factory.scoring.bootstrap.CHUNK", 1000)
    assert paired_deltas({"m": one}, resamples=50)["m"].value == whole["m"].value


def test_bca_shifts_the_quantiles_of_a_skewed_statistic():
    generator = np.random.default_rng(5)
    sample = generator.exponential(1.0, 60)
    drawn = sample[generator.integers(0, 60, (4000, 60))].mean(axis=1)
    left_out = (sample.sum() - sample) / 59
    plain = np.quantile(drawn, [0.025, 0.975])
    low, high = bca_interval(float(sample.mean()), drawn, left_out)
    assert low > plain[0]
    assert high > plain[1]
    scipy = pytest.importorskip("scipy.stats")
    result = scipy.bootstrap((sample,), np.mean, n_resamples=4000, method="BCa", rng=generator)
    assert (low, high) == pytest.approx(tuple(result.confidence_interval), abs=0.03)
