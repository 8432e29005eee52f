"""From answers to metrics: one variant's numbers, and the differences between two with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from unsloth_factory.evaluation.report import Comparison, Direction, Metric, Verdict
from unsloth_factory.evaluation.validation.answers import BERTSCORE, BINARY, DIRECTIONS, PERPLEXITY, Answer, Sample
from unsloth_factory.inference.perplexity import AnswerLoss
from unsloth_factory.scoring import mcnemar, normalize_answer
from unsloth_factory.scoring.bertscore import BertScorer
from unsloth_factory.scoring.bootstrap import (
    OfSums,
    Statistic,
    jackknife_error,
    mean_features,
    paired_deltas,
    ratio,
)
from unsloth_factory.scoring.json_answers import compare_fields, extract_json, reference_object
from unsloth_factory.scoring.labels import AVERAGES, label_features, macro_scores, read_label
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


def complete(answer: Answer, sample: Sample, loss: AnswerLoss | None, labels: Sequence[str] = ()) -> Answer:
    """The answer with the scores that need more than itself.

    Args:
        answer: As `read_answer` gives it.
        sample: Its question and reference; a reference that is a JSON object has its fields compared.
        loss: Of the reference, if it was measured.
        labels: As `detect_labels` gives them; () outside of label tasks.
    """
    scores: dict[str, float | None] = {**answer.scores, **text_scores(answer.text, sample.reference)}
    remarks: list[str] = []
    if loss is not None:
        scores[PERPLEXITY] = float(np.exp(min(loss.total / loss.tokens, 700.0)))
    if labels:
        given, expected = read_label(answer.text, labels), normalize_answer(sample.reference)
        scores["label accuracy"] = float(given == expected)
        if given != expected:
            remarks.append(f"label {given or 'not given'} instead of {expected}")
    reference = reference_object(sample.reference)
    if reference is not None:
        found = extract_json(answer.text)
        fields = compare_fields(found.value if found else None, reference)
        scores |= {
            "JSON object found": float(found is not None),
            "JSON field accuracy": fields.accuracy,
            "JSON field F1": fields.f1,
        }
        wrong = [name for name, right in fields.right.items() if not right]
        if wrong:
            remarks.append(f"wrong fields: {', '.join(wrong)}" if found else "no readable JSON object")
    return replace(answer, scores=scores, remarks=(*answer.remarks, *remarks))


def with_similarity(answers: Sequence[Answer], references: Sequence[str], scorer: BertScorer) -> list[Answer]:
    """The answers with their BERTScore."""
    values = scorer([answer.text for answer in answers], references)
    return [
        replace(answer, scores={**answer.scores, BERTSCORE: value})
        for answer, value in zip(answers, values, strict=True)
    ]


def measures(
    answers: Sequence[Answer],
    losses: Sequence[AnswerLoss | None],
    references: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> dict[str, Measure]:
    """Every metric over one variant's answers, in the order of the table.

    Args:
        answers: Completed ones.
        losses: Of their references.
        references: The references, for a label task.
        labels: Its labels; () outside of label tasks.
    """
    found = {}
    for name in DIRECTIONS:
        if name in AVERAGES:
            if labels:
                given = [read_label(answer.text, labels) for answer in answers]
                counts = label_features(given, [normalize_answer(reference) for reference in references], labels)
                found[name] = Measure(counts, partial(_average, name))
            continue
        if name == PERPLEXITY:
            sums = [(loss.total, loss.tokens) if loss else (0.0, 0.0) for loss in losses]
            found[name] = Measure(np.array(sums, dtype=float).reshape(-1, 2), _perplexity)
            continue
        values = [np.nan if (value := answer.scores[name]) is None else value for answer in answers]
        found[name] = Measure(mean_features(np.array(values, dtype=float)), ratio)
    return found


def _average(name: str, sums: np.ndarray) -> np.ndarray:
    return macro_scores(sums)[name]


def field_table(samples: Sequence[Sample], answers: Mapping[str, Sequence[Answer]]) -> dict[str, dict[str, Any]]:
    """JSON references by field: field -> how many references have it, and each variant's share of right ones."""
    table: dict[str, dict[str, Any]] = {}
    for variant, given in answers.items():
        for sample, answer in zip(samples, given, strict=True):
            reference = reference_object(sample.reference)
            if reference is None:
                continue
            found = extract_json(answer.text)
            for name, right in compare_fields(found.value if found else None, reference).right.items():
                row = table.setdefault(name, {"n": 0, **dict.fromkeys(answers, 0)})
                row[variant] += right
                row["n"] += variant == next(iter(answers))
    return {
        name: {"n": row["n"], **{variant: row[variant] / row["n"] for variant in answers}}
        for name, row in sorted(table.items(), key=lambda item: -item[1]["n"])
    }


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
