"""Label tasks: answers that are one of a few short labels."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from unsloth_factory.scoring.answers import normalize_answer
from unsloth_factory.scoring.negation import is_negated
from unsloth_factory.scoring.text import HAS_CJK

FEWEST_ANSWERS = 10
MOST_LABELS = 20
REPEATED = 5
LONGEST_LABEL = 20
AVERAGES = ("macro precision", "macro recall", "macro F1")


def detect_labels(references: Sequence[str]) -> tuple[str, ...]:
    """The labels of a label task, in order of frequency; () where the references are no labels.

    A label task has 10 references or more, 2 to 20 distinct ones (as `normalize_answer` has it), on average 5 of each,
    none longer than 20 characters.
    """
    counts = Counter(normalize_answer(reference) for reference in references)
    few = 2 <= len(counts) <= min(MOST_LABELS, len(references) // REPEATED)
    if len(references) < FEWEST_ANSWERS or not few or not all(0 < len(label) <= LONGEST_LABEL for label in counts):
        return ()
    return tuple(label for label, _ in counts.most_common())


def read_label(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer gives: it alone, or the only one that the answer names; None for none and for several.

    A label inside a longer one (阳性 in 弱阳性) or inside a word (no in normal) is not named, nor is a negated one.
    """
    whole = normalize_answer(answer)
    if whole in labels:
        return whole
    text = unicodedata.normalize("NFKC", answer).casefold()  # with its punctuation: it ends what a negation reaches
    ordered = sorted(labels, key=len, reverse=True)
    pattern = "|".join(
        re.escape(x) if HAS_CJK.search(x) else rf"(?<![a-z0-9]){re.escape(x)}(?![a-z0-9])" for x in ordered
    )
    named = {match.group() for match in re.finditer(pattern, text) if not is_negated(text, *match.span())}
    return named.pop() if len(named) == 1 else None


def label_features(given: Sequence[str | None], expected: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Counts whose sums are the confusion counts: float64 [n, 3 k], right, given and expected for each of k labels."""
    answers = np.array([[label == one for label in labels] for one in given], dtype=float).reshape(-1, len(labels))
    truth = np.array([[label == one for label in labels] for one in expected], dtype=float).reshape(-1, len(labels))
    return np.concatenate([answers * truth, answers, truth], axis=1)


def macro_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Macro precision, recall and F1 of sums [..., 3 k]; each [...].

    The plain mean over the labels that occur among the references, as sklearn's precision_recall_fscore_support has it
    with labels=(the references' labels), average="macro", zero_division=0. A resample in which a label does not occur
    is averaged over the others.
    """
    right, given, expected = np.split(sums, 3, axis=-1)
    there = expected > 0
    count = np.maximum(there.sum(-1), 1)

    def mean(parts: np.ndarray, whole: np.ndarray) -> np.ndarray:
        shares = np.divide(parts, whole, out=np.zeros_like(parts), where=whole > 0)
        return (shares * there).sum(-1) / count

    averages = (mean(right, given), mean(right, expected), mean(2 * right, given + expected))
    return dict(zip(AVERAGES, averages, strict=True))


def label_advice(expected: Sequence[str]) -> str:
    """Which of the label metrics to read, by how unequal the labels are."""
    (label, most), *_ = Counter(expected).most_common(1)
    share = most / len(expected)
    if share >= 2 / max(2, len(set(expected))) or share > 0.6:
        first = (
            f"read macro F1: {label!r} alone is {share:.0%} of the references, and accuracy rewards saying it always"
        )
    else:
        first = "read accuracy: the labels are about equally frequent"
    return f"{first}. Recall where a missed case costs most (screening), precision where a false alarm does."
