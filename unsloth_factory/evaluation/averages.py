"""Accuracies with their standard errors: per subject, over all questions (micro), over subjects (macro), by group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from unsloth_factory.evaluation.choice.benchmark import Subject
from unsloth_factory.evaluation.report import Comparison, Metric, Verdict
from unsloth_factory.scoring import macro_standard_error, mcnemar
from unsloth_factory.scoring.significance import ALPHA, Z_95

MACRO, MICRO, HARD = "macro accuracy", "micro accuracy", "hard"


def mean_metric(values: Sequence[float] | np.ndarray) -> Metric:
    """Mean and its standard error s / sqrt(n), s with n - 1 (for 0/1 values: sqrt(p (1 - p) / (n - 1)))."""
    array = np.asarray(values, dtype=float)
    n = len(array)
    error = float(array.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0
    return Metric(float(array.mean()) if n else 0.0, error, n)


def macro_metric(parts: Sequence[Metric]) -> Metric:
    """Mean of the subjects' means; the errors of independent subjects add in squares."""
    count = len(parts)
    error = macro_standard_error([part.standard_error for part in parts])
    return Metric(sum(part.value for part in parts) / count, error, sum(part.n for part in parts))


def accuracy_metrics(subjects: Sequence[Subject], correct: Mapping[str, np.ndarray]) -> dict[str, Metric]:
    """Macro, micro, each group (macro over its subjects) and the hard subjects.

    Args:
        subjects: The scored ones, in order.
        correct: subject -> 0/1 for each of its questions; any per-question number works, differences too.
    """
    by_subject = {subject.name: mean_metric(correct[subject.name]) for subject in subjects}
    metrics = {
        MACRO: macro_metric(list(by_subject.values())),
        MICRO: mean_metric(np.concatenate([correct[subject.name] for subject in subjects])),
    }
    for group in dict.fromkeys(subject.group for subject in subjects if subject.group):
        metrics[group] = macro_metric([by_subject[s.name] for s in subjects if s.group == group])
    hard = [by_subject[subject.name] for subject in subjects if subject.hard]
    if hard:
        metrics[HARD] = macro_metric(hard)
    return metrics


def compare_accuracies(
    subjects: Sequence[Subject], base: Mapping[str, np.ndarray], tuned: Mapping[str, np.ndarray]
) -> dict[str, Comparison]:
    """Tuned against base on the same questions, for every metric of `accuracy_metrics`.

    The paired differences carry the test: micro by McNemar's exact test, averages over subjects by the normal
    approximation. Only a difference beyond the error is called one.
    """
    before, after = accuracy_metrics(subjects, base), accuracy_metrics(subjects, tuned)
    paired = accuracy_metrics(subjects, {name: tuned[name] - base[name] for name in base})
    discordant = Counter(float(value) for s in subjects for value in tuned[s.name] - base[s.name])
    comparisons = {}
    for name, difference in paired.items():
        p_value = normal_p(difference.value, difference.standard_error)
        if name == MICRO:
            p_value = mcnemar(discordant[-1.0], discordant[1.0])
        comparisons[name] = compare(before[name].value, after[name].value, difference.standard_error, p_value)
    return comparisons


def compare(base: float, tuned: float, error: float, p_value: float | None, better: str = "higher") -> Comparison:
    """A comparison from the standard error of the paired difference.

    The verdict needs both an interval that excludes zero and, where there is a test, p < 0.05.
    """
    delta = tuned - base
    interval = (delta - Z_95 * error, delta + Z_95 * error)
    beyond = delta != 0 and not interval[0] <= 0 <= interval[1] and (p_value is None or p_value < ALPHA)
    verdict: Verdict = "no difference beyond the error"
    if better == "neutral":
        verdict = ""
    elif beyond:
        verdict = "better" if (delta > 0) == (better == "higher") else "worse"
    return Comparison(base, tuned, delta, interval, p_value, verdict)


def normal_p(difference: float, error: float) -> float:
    """Two-sided p-value of a difference with this standard error; 1 when nothing differs at all."""
    if error == 0:
        return 1.0 if difference == 0 else 0.0
    return math.erfc(abs(difference) / error / math.sqrt(2))


def letter_counts(choices: Sequence[str], letters: Sequence[str]) -> dict[str, int]:
    """How often each letter was chosen: a model that cannot read the questions shows it here."""
    counted = Counter(choices)
    return {letter: counted[letter] for letter in letters}


def constant_scores(
    subjects: Sequence[Subject], answers: Mapping[str, Sequence[str]], letters: Sequence[str]
) -> dict[str, dict[str, float]]:
    """What a model scores that always says the same letter: letter -> macro and micro accuracy."""
    scores = {}
    for letter in letters:
        correct = {name: np.array([float(answer == letter) for answer in key]) for name, key in answers.items()}
        metrics = accuracy_metrics(subjects, correct)
        scores[letter] = {"macro": metrics[MACRO].value, "micro": metrics[MICRO].value}
    return scores
