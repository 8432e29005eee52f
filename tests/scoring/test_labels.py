"""Label tasks: which they are, what an answer says, and averages equal to sklearn's."""

from __future__ import annotations

import numpy as np
import pytest

from unsloth_factory.scoring.labels import detect_labels, label_advice, label_features, macro_scores, read_label


def test_what_is_a_label_task():
    assert detect_labels(["阳性。"] * 7 + ["阴性"] * 3) == ("阳性", "阴性")
    assert detect_labels(["Yes"] * 5 + ["no."] * 4) == ()  # 9 answers
    assert detect_labels(["yes"] * 20) == ()  # one label
    assert detect_labels([str(i % 4) for i in range(15)]) == ()  # fewer than 5 of each
    assert detect_labels(["高血压患者应低盐饮食，按时服药，并定期测量血压。"] * 6 + ["好"] * 6) == ()
    assert len(detect_labels([str(i % 21) for i in range(210)])) == 0
    assert len(detect_labels([str(i % 20) for i in range(200)])) == 20
    assert detect_labels([]) == ()


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("阳性。", "阳性"),
        ("结果为阳性", "阳性"),
        ("结果为弱阳性", "弱阳性"),
        ("可能阳性，也可能阴性", None),
        ("不是阴性，是阳性", "阳性"),
        ("不知道", None),
        ("", None),
        ("It is normal", None),
        ("The answer is: No.", "no"),
    ],
)
def test_what_an_answer_says(answer, label):
    assert read_label(answer, ("阳性", "阴性", "弱阳性", "no")) == label


def scores(given, expected, labels):
    return {k: float(v) for k, v in macro_scores(label_features(given, expected, labels).sum(0)).items()}


def test_averages_by_hand():
    """a: 2 right of 3 given and 3 expected; b: 1 of 2 and 2; c: never given."""
    found = scores(["a", "a", "b", "a", "b", None], ["a", "a", "a", "b", "b", "c"], ("a", "b", "c"))
    assert found == pytest.approx(
        {"macro precision": (2 / 3 + 1 / 2) / 3, "macro recall": (2 / 3 + 1 / 2) / 3, "macro F1": (2 / 3 + 1 / 2) / 3}
    )
    skewed = scores(["a"] * 4, ["a", "a", "a", "b"], ("a", "b"))
    assert skewed["macro precision"] == pytest.approx(0.75 / 2)
    assert skewed["macro recall"] == pytest.approx(0.5)
    assert skewed["macro F1"] == pytest.approx((2 * 3 / 7) / 2)


def test_averages_are_sklearns():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    for kinds in (2, 3, 7):
        labels = [f"l{i}" for i in range(kinds)]
        expected = [*labels, *(labels[i] for i in generator.integers(0, kinds, 60) ** 2 % kinds)]
        answers = [None if i == kinds else labels[i] for i in generator.integers(0, kinds + 1, len(expected))]
        answers = [e if generator.random() < 0.5 else a for a, e in zip(answers, expected, strict=True)]
        direct = sklearn.precision_recall_fscore_support(
            expected, [a or "none" for a in answers], labels=labels, average="macro", zero_division=0
        )[:3]
        assert tuple(scores(answers, expected, labels).values()) == pytest.approx(direct)


def test_many_resamples_at_once_and_a_label_that_is_not_there():
    features = label_features(["a", "b"], ["a", "b"], ("a", "b"))
    sums = np.stack([features.sum(0), features[0] * 2])
    assert macro_scores(sums)["macro F1"].tolist() == [1.0, 1.0]


def test_advice():
    assert label_advice(["a"] * 9 + ["b"]).startswith("read macro F1: 'a' alone is 90%")
    assert label_advice(["a", "b"] * 5).startswith("read accuracy")
    assert label_advice(["a"] * 5 + ["b"] * 5 + ["c"] * 5).startswith("read accuracy")
    assert label_advice(["a"] * 7 + ["b"] + ["c"] + ["d"]).startswith("read macro F1")
