"""Each cause is named by what speaks for it, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unsloth_factory.evaluation.report import Comparison
from unsloth_factory.evaluation.validation.answers import PERPLEXITY, Answer, Sample
from unsloth_factory.evaluation.validation.causes import Evidence, likely_causes
from unsloth_factory.inference.perplexity import AnswerLoss

FINE = Answer("低盐饮食", None, (), True, 4, None, (), {})


def names(wrong: Answer, count: int, reference_tokens: int = 5, **more) -> list[str]:
    """Causes when `count` of 20 different answers are like `wrong`."""
    answers = [
        replace(wrong if i < count else FINE, text=f"{wrong.text if i < count else ''} 答案{i}") for i in range(20)
    ]
    samples = [Sample((), f"参考{i}", f"d.csv:{i}") for i in range(20)]
    losses = [AnswerLoss(1.0, reference_tokens)] * 20
    return [cause.name for cause in likely_causes(Evidence(samples, answers, 100, losses, **more))]


@pytest.mark.parametrize(
    ("wrong", "count", "cause"),
    [
        (replace(FINE, leaked=("<|im_start|>",)), 2, "template pollution"),
        (replace(FINE, thinking="stray tags"), 3, "template pollution"),
        (replace(FINE, thinking="missing"), 20, "thinking that was not trained"),
        (replace(FINE, thinking="no answer after it"), 2, "thinking without an end"),
        (replace(FINE, switch="Latin instead of Chinese"), 2, "the base's language shows through"),
        (replace(FINE, loop="多喝水吧。"), 2, "repetition"),
        (replace(FINE, stopped=False, tokens=100), 4, "never learned to stop"),
    ],
)
def test_named_where_there_are_enough(wrong, count, cause):
    assert names(wrong, count) == [cause]
    assert names(wrong, 1) == []


def test_cut_off_answers_are_told_apart_by_their_references():
    cut = replace(FINE, stopped=False, tokens=100)
    assert names(cut, 3, reference_tokens=90) == ["truncation"]
    assert names(cut, 10, reference_tokens=90) == ["truncation"]
    assert names(cut, 3, reference_tokens=20) == []
    answers = [cut] * 2 + [replace(FINE, text=str(i)) for i in range(18)]
    seen = Evidence([Sample((), str(i), "x") for i in range(20)], answers, 100)
    assert [cause.name for cause in likely_causes(seen)] == ["truncation or never learned to stop"]


def test_thinking_that_was_not_cut_off_needs_no_more_tokens():
    endless = replace(FINE, text="", thinking="no answer after it")
    for stopped, advice in ((True, "train on rows with reasoning"), (False, "give more --max_new_tokens than 100")):
        answers = [replace(endless, stopped=stopped, tokens=0)] * 2
        (cause,) = likely_causes(Evidence([Sample((), str(i), "x") for i in range(2)], answers, 100))
        assert cause.advice == f"{advice}, or give --think_chain false"


def test_the_advice_of_a_truncation_is_a_budget_that_is_enough():
    cut = [replace(FINE, text=str(i), stopped=False, tokens=100) for i in range(4)]
    losses = [AnswerLoss(1.0, n) for n in (90, 120, 150, 400)]
    (cause,) = likely_causes(Evidence([Sample((), str(i), "x") for i in range(4)], cut, 100, losses))
    assert "--max_new_tokens 800" in cause.advice
    assert "4 of 4 answers" in cause.evidence


@pytest.mark.parametrize(("verdict", "expected"), [("worse", ["over-fitting"]), ("better", [])])
def test_references_that_surprise_more_are_over_fitting(verdict, expected):
    compared = {PERPLEXITY: Comparison(3.0, 5.0, 2.0, (1.0, 3.0), 0.001, verdict)}
    assert names(FINE, 0, comparisons=compared) == expected


def test_one_answer_for_all_questions():
    samples = [Sample((), f"参考{i}", "x") for i in range(10)]
    seen = Evidence(samples, [FINE] * 4 + [replace(FINE, text=str(i)) for i in range(6)], 100)
    assert [cause.name for cause in likely_causes(seen)] == ["over-fitting (one answer for all questions)"]
    labels = [Sample((), "低盐饮食" if i < 4 else "否", "x") for i in range(10)]
    assert likely_causes(replace(seen, samples=labels)) == []
