"""Validation by hand: answers whose scores are known, means, comparisons and the worst first."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
from rich.console import Console

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Conversation, Turn
from unsloth_factory.evaluation.tables import print_report, print_worst
from unsloth_factory.evaluation.validation import validate as module
from unsloth_factory.evaluation.validation.answers import Sample, problems, read_answer, samples_of
from unsloth_factory.evaluation.validation.validate import Questions, model_answerers, validate
from unsloth_factory.inference.generate import Generation
from unsloth_factory.knowledge import load_pack


class Template:
    """Ids are code points; 1 is a leaked control token."""

    stop_ids = (0,)
    control_tokens = ("<|im_end|>",)
    sha256 = "t"

    def encode_prompt(self, turns, thinking):
        return [ord(char) for turn in turns for char in turn.content]

    def decode_answer(self, ids, thinking=None):
        text = "".join(chr(i) for i in ids if i != 1)
        reasoning, _, answer = text.rpartition("</think>")
        return reasoning or None, answer, ["<|im_start|>"] * ids.count(1)


def said(text: str, stopped: bool = True) -> Generation:
    return Generation([ord(char) for char in text], stopped)


def sample(question: str = "高血压患者平时注意什么？", reference: str = "低盐饮食。") -> Sample:
    return Sample((Turn("user", question),), reference, "d.csv:2")


@pytest.fixture(scope="module")
def pack():
    return load_pack("medical")


def test_a_perfect_answer(pack):
    answer = read_answer(said("低盐饮食"), sample(), Template(), False, pack)
    assert answer.scores["exact match"] == 1.0  # punctuation says nothing
    assert answer.scores["stopped by itself"] == 1.0
    assert answer.scores["answer tokens"] == 4.0
    assert problems(answer) == []


def test_everything_that_can_be_wrong(pack):
    text = "误服强酸后应立即催吐。" + "多喝水吧。" * 10 + "<|im_end|>"
    ids = [*[ord(char) for char in text], 1]
    answer = read_answer(Generation(ids, False), sample("误服强酸怎么办？"), Template(), False, pack)
    assert answer.scores["exact match"] == 0.0
    assert answer.scores["control-token leaks"] == 1.0
    assert answer.leaked == ("<|im_start|>", "<|im_end|>")
    assert answer.scores["stopped by itself"] == 0.0
    assert answer.scores["repetition loops"] == 1.0
    by_severity = [answer.scores[f"{s} violations per answer"] for s in ("critical", "major", "minor")]
    assert sum(by_severity) == len(answer.violations) >= 1
    found = problems(answer)
    assert "立即催吐" in found[0]
    assert any(problem.startswith("control tokens") for problem in found)
    assert f"cut off after {len(ids)} tokens" in found
    assert any("多喝水吧" in problem and problem.startswith("repeats") for problem in found)


def test_reasoning_is_not_the_answer(pack):
    answer = read_answer(said("先立即催吐？</think>低盐饮食。"), sample(), Template(), True, pack)
    assert answer.scores["exact match"] == 1.0
    assert answer.reasoning == "先立即催吐？"
    assert answer.violations == ()
    empty = read_answer(said("一直想</think>"), sample(), Template(), True, pack)
    assert empty.scores["empty answers"] == 1.0
    assert problems(empty) == ["no answer after the reasoning"]


def test_without_a_pack_nothing_of_its_field_is_claimed():
    answer = read_answer(said("立即催吐"), sample(), Template(), False, None)
    assert answer.scores["critical violations per answer"] is None
    assert answer.scores["term coverage"] is None


def test_the_last_assistant_turn_is_the_reference_and_the_system_prompt_is_added():
    turns = (Turn("user", "q1"), Turn("assistant", "a1", "r1"), Turn("user", "q2"), Turn("assistant", "a2"))
    conversations = [
        Conversation(turns, "x:1"),
        Conversation((Turn("system", "own"), *turns[:2], Turn("user", "left over")), "x:2"),
        Conversation((Turn("user", "no answer"),), "x:3"),
    ]
    first, second = samples_of(conversations, "S")
    assert first == Sample((Turn("system", "S"), *turns[:3]), "a2", "x:1")
    assert first.question == "q2"
    assert second == Sample((Turn("system", "own"), turns[0]), "a1", "x:2", "r1")


class Model:
    """Answers from a table; the adapter makes the difference."""

    def __init__(self, base: list[Generation], tuned: list[Generation]) -> None:
        self.answers = {"base": base, "tuned": tuned}
        self.mode = "tuned"

    @contextmanager
    def adapter_disabled(self):
        self.mode = "base"
        yield
        self.mode = "tuned"


@pytest.fixture
def answered(monkeypatch):
    """`validate` with the generator replaced by a table."""

    def fake(model, prompts, *, on_progress, **settings):
        assert settings["sampling"].temperature == 0
        on_progress(len(prompts), len(prompts))
        return model.answers[model.mode]

    monkeypatch.setattr(module, "generate", fake)

    def run(base, tuned, variants=("base", "tuned"), question="高血压怎么办？", reference="低盐饮食。"):
        seen: list[tuple[int, int]] = []
        samples = [sample(question, reference) for _ in tuned]
        questions = Questions(samples=samples, template=Template(), pack=load_pack("medical"))
        model = Model(base, tuned)
        answerers = model_answerers(model, variants)
        result = validate(answerers, questions, max_positions=100, on_progress=lambda *p: seen.append(p))
        return result, seen

    return run


def test_means_errors_and_verdicts(answered):
    right, wrong = said("低盐饮食"), said("不知道", stopped=False)
    result, seen = answered([wrong] * 10, [right] * 8 + [wrong] * 2)
    tuned, comparison = result.report.metrics["tuned"]["exact match"], result.report.comparisons["exact match"]
    assert tuned.value == pytest.approx(0.8)
    assert tuned.standard_error == pytest.approx(math.sqrt(0.8 * 0.2 / 9))
    assert (comparison.base, comparison.delta) == (0.0, pytest.approx(0.8))
    assert comparison.p_value == pytest.approx(2 / 256)
    assert comparison.verdict == "better"
    assert result.report.comparisons["stopped by itself"].verdict == "better"
    assert result.report.comparisons["answer tokens"].verdict == ""
    assert result.report.comparisons["control-token leaks"].verdict == "no difference beyond the error"
    assert seen == [(10, 20), (20, 20)]
    json.dumps(result.report.to_dict(), allow_nan=False)


def test_two_right_answers_more_are_no_improvement(answered):
    right, wrong = said("低盐饮食"), said("不知道")
    result, _ = answered([wrong] * 6, [right] * 2 + [wrong] * 4)
    assert result.report.comparisons["exact match"].verdict == "no difference beyond the error"


def test_the_worst_come_first_with_what_is_wrong(answered, capsys):
    answers = [said("低盐饮食"), said("不知道"), said("误服强酸应立即催吐。"), said("不知道", stopped=False)]
    result, _ = answered(answers, answers, question="误服强酸怎么办？")
    worst = result.report.details["worst"]
    assert [item["tuned"] for item in worst][0] == "误服强酸应立即催吐。"
    assert worst[0]["problems"]
    assert worst[1]["problems"][-1] == "cut off after 3 tokens"
    assert set(result.report.details["rules_broken"]) == {"base", "tuned"}
    console = Console(width=120)
    print_report(result.report, console)
    print_worst(result.report, console)
    printed = capsys.readouterr().out
    assert "worst: d.csv:2" in printed
    assert "立即催吐" in printed
    assert "exact match *" in printed


def test_one_variant_has_nothing_to_compare(answered):
    result, seen = answered([], [said("x")], variants=("tuned",))
    assert result.report.comparisons == {}
    assert seen == [(1, 1)]
    assert result.records[0]["tuned"]["answer"] == "x"


def test_samples_that_do_not_fit(answered):
    with pytest.raises(UserError, match="No validation sample fits the model's context of 100 tokens"):
        answered([], [said("x")], question="长" * 100)
    with pytest.raises(UserError, match="Give some with --dataset"):
        answered([], [])
