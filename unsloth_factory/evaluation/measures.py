"""From answers to metrics: one variant's numbers, and the differences between two with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unsloth_factory.evaluation.answers import BINARY, DIRECTIONS, PERPLEXITY, Answer, Sample
from unsloth_factory.evaluation.report import Comparison, Direction, Metric, Verdict
from unsloth_factory.inference.perplexity import AnswerLoss
from unsloth_factory.scoring import mcnemar
from unsloth_factory.scoring.bootstrap import (
    OfSums,
    Statistic,
    jackknife_error,
    mean_features,
    paired_deltas,
    ratio,
)
from unsloth_factory.scoring.significance import ALPHA
from unsloth_factory.scoring.text import INSTALL_HINT, corpus_scores, missing_libraries, text_scores


@dataclass(frozen=True)
class Measure:
    """One metric of one variant, as sums over the answers can give it."""

    features: np.ndarray
    """float64 [n, f]; a row of zeros where the metric says nothing about the answer."""
    of_sums: OfSums

    @property
    def present(self) -> np.ndarray:
        """Answers that it says something about, bool [n]."""
        return np.asarray(np.any(self.features != 0, axis=1))


def complete(answer: Answer, sample: Sample, loss: AnswerLoss | None) -> Answer:
    """The answer with the scores that need more than itself: its words against the reference's, that one's loss."""
    scores: dict[str, float | None] = {**answer.scores, **text_scores(answer.text, sample.reference)}
    if loss is not None:
        scores[PERPLEXITY] = float(np.exp(min(loss.total / loss.tokens, 700.0)))
    return replace(answer, scores=scores)


def measures(answers: Sequence[Answer], losses: Sequence[AnswerLoss | None]) -> dict[str, Measure]:
    """Every metric over one variant's answers, in the order of the table."""
    found = {}
    for name in DIRECTIONS:
        if name == PERPLEXITY:
            sums = [(loss.total, loss.tokens) if loss else (0.0, 0.0) for loss in losses]
            found[name] = Measure(np.array(sums, dtype=float).reshape(-1, 2), _perplexity)
            continue
        values = [np.nan if (value := answer.scores[name]) is None else value for answer in answers]
        found[name] = Measure(mean_features(np.array(values, dtype=float)), ratio)
    return found


def _perplexity(sums: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio(sums), 700.0))


def metrics(measured: Mapping[str, Measure]) -> dict[str, Metric]:
    """Value, standard error (jackknife) and number of answers of each metric; n = 0 where there is none."""
    table = {}
    for name, one in measured.items():
        n = int(one.present.sum())
        value = float(one.of_sums(one.features.sum(0))) if n else 0.0
        table[name] = Metric(value, jackknife_error(one.features, one.of_sums), n, direction(name))
    return table


def direction(name: str) -> Direction:
    """Which way is better."""
    return DIRECTIONS.get(name, "higher")


def comparisons(base: Mapping[str, Measure], tuned: Mapping[str, Measure]) -> dict[str, Comparison]:
    """Tuned against base, over the samples for which both have a value.

    95 % intervals by paired bootstrap; p-values by approximate randomisation, of the 0/1 metrics by McNemar's exact
    test. A verdict needs both an interval without zero and p < 0.05.
    """
    statistics = {}
    for name in base:
        both = base[name].present & tuned[name].present
        if both.any():
            before, after = (np.where(both[:, None], side[name].features, 0.0) for side in (base, tuned))
            statistics[name] = Statistic(before, after, base[name].of_sums)
    compared = {}
    for name, delta in paired_deltas(statistics).items():
        one = statistics[name]
        p_value = delta.p_value
        if name in BINARY:
            change = one.tuned[:, 0] - one.base[:, 0]
            p_value = mcnemar(int((change < 0).sum()), int((change > 0).sum()))
        values = [float(one.of_sums(side.sum(0))) for side in (one.base, one.tuned)]
        verdict = _verdict(delta.value, delta.interval, p_value, direction(name))
        compared[name] = Comparison(values[0], values[1], delta.value, delta.interval, p_value, verdict)
    return compared


def _verdict(delta: float, interval: tuple[float, float], p_value: float, better: str) -> Verdict:
    if better == "neutral":
        return ""
    if delta == 0 or interval[0] <= 0 <= interval[1] or p_value >= ALPHA:
        return "no difference beyond the error"
    return "better" if (delta > 0) == (better == "higher") else "worse"


def corpus_details(samples: Sequence[Sample], answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, Any]]:
    """By variant: BLEU-4 and chrF over all answers at once, with their signatures."""
    references = [sample.reference for sample in samples]
    found = {name: corpus_scores([answer.text for answer in given], references) for name, given in answers.items()}
    return {name: vars(scores) for name, scores in found.items() if scores is not None}


def library_notes() -> list[str]:
    """What is left out because a library is not installed, and how to get it."""
    return [
        f"{', '.join(names)} left out: {module} is not installed. {INSTALL_HINT}"
        for module, names in missing_libraries().items()
    ]
