"""Metrics and differences of a validation from answers whose scores are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from unsloth_factory.evaluation.validation import measures as module
from unsloth_factory.evaluation.validation.answers import DIRECTIONS, PERPLEXITY, Answer, Sample
from unsloth_factory.evaluation.validation.measures import (
    comparisons,
    complete,
    field_table,
    library_notes,
    measures,
    metrics,
)
from unsloth_factory.inference.perplexity import AnswerLoss


def answer(text: str = "", **scores: float) -> Answer:
    known = {name: None for name in DIRECTIONS} | {name.replace("_", " "): value for name, value in scores.items()}
    return Answer(text, None, (), True, 3, None, (), known)


def test_perplexity_weighs_every_token_the_same():
    losses = [AnswerLoss(10.0, 10), AnswerLoss(1.0, 90), None]
    one = metrics(measures([answer()] * 3, losses))[PERPLEXITY]
    assert one.value == pytest.approx(math.exp(11 / 100))
    assert (one.n, one.better) == (2, "lower")
    assert metrics(measures([answer()], [None]))[PERPLEXITY].n == 0


def test_errors_of_means_are_the_usual_ones():
    values = [0.1, 0.5, 0.9, 0.4]
    one = metrics(measures([answer(token_F1=v) for v in values] + [answer()], [None] * 5))["token F1"]
    assert one.value == pytest.approx(np.mean(values))
    assert one.standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert one.n == 4


def test_lower_perplexity_is_better_and_lower_chrf_worse():
    rng = np.random.default_rng(0)
    base = measures([answer(chrF=v) for v in 60 + rng.random(40)], [AnswerLoss(30.0 + v, 10) for v in rng.random(40)])
    tuned = measures([answer(chrF=v) for v in 50 + rng.random(40)], [AnswerLoss(20.0 + v, 10) for v in rng.random(40)])
    compared = comparisons(base, tuned)
    assert compared.keys() == {"chrF", PERPLEXITY}
    assert compared["chrF"].verdict == "worse"
    assert compared["chrF"].interval[1] < -9
    assert compared[PERPLEXITY].verdict == "better"
    low, high = compared[PERPLEXITY].interval
    assert low < math.exp(2.05) - math.exp(3.05) < high < 0


def test_only_samples_that_both_answered_are_compared():
    base = measures([answer(chrF=10.0), answer(), answer(chrF=20.0)], [None] * 3)
    tuned = measures([answer(chrF=30.0), answer(chrF=90.0), answer()], [None] * 3)
    compared = comparisons(base, tuned)["chrF"]
    assert (compared.base, compared.tuned, compared.delta) == (10.0, 30.0, 20.0)
    assert compared.verdict == "no difference beyond the error"  # one sample is none


def test_complete_adds_what_the_reference_tells():
    sample = Sample((), "低盐饮食", "x:1")
    done = complete(answer("低盐饮食"), sample, AnswerLoss(2.0, 2))
    assert done.scores["token F1"] == 1.0
    assert done.scores[PERPLEXITY] == pytest.approx(math.e)
    assert complete(answer("x"), sample, None).scores[PERPLEXITY] is None


def test_a_missing_library_is_said_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(module, "missing_libraries", lambda: {"sacrebleu": ("BLEU-4", "chrF")})
    assert library_notes() == ["BLEU-4, chrF left out: sacrebleu is not installed. pip install 'unsloth-factory[eval]'"]


def test_json_references_are_compared_by_field():
    samples = [
        Sample((), '{"病名": "感冒", "等级": 1}', "x:1"),
        Sample((), '{"病名": "肺炎"}', "x:2"),
        Sample((), "好", "x:3"),
    ]
    texts = ["结果：{'病名': '感冒', '等级': 2,}", "不知道", "{}"]
    done = [complete(answer(t), s, None) for t, s in zip(texts, samples, strict=True)]
    table = metrics(measures(done, [None] * 3))
    assert (table["JSON object found"].value, table["JSON object found"].n) == (0.5, 2)
    assert table["JSON field accuracy"].value == pytest.approx((1 / 2 + 0) / 2)
    assert table["JSON field F1"].value == pytest.approx((1 / 2 + 0) / 2)
    assert done[0].remarks == ("wrong fields: 等级",)
    assert done[1].remarks == ("no readable JSON object",)
    assert done[2].remarks == ()
    assert field_table(samples, {"tuned": done}) == {"病名": {"n": 2, "tuned": 0.5}, "等级": {"n": 1, "tuned": 0.0}}


def test_label_tasks_have_averages_and_differences():
    labels = ("阳性", "阴性")
    references = ["阳性"] * 15 + ["阴性"] * 10
    samples = [Sample((), reference, "x") for reference in references]

    def measured(texts):
        done = [complete(answer(t), s, None, labels) for t, s in zip(texts, samples, strict=True)]
        return done, measures(done, [None] * 25, references, labels)

    always, base = measured(["阳性。"] * 25)
    _, tuned = measured(["结果为" + reference for reference in references])
    table = metrics(base)
    assert table["label accuracy"].value == 0.6
    assert table["macro F1"].value == pytest.approx((2 * 15 / 40) / 2)
    assert table["macro recall"].value == 0.5
    assert always[-1].remarks == ("label 阳性 instead of 阴性",)
    compared = comparisons(base, tuned)
    assert compared["macro F1"].tuned == 1.0
    assert compared["macro F1"].verdict == "better"
    assert "macro F1" not in measures([answer()], [None])
