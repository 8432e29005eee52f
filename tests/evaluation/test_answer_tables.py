"""One's own questions with reference answers: the scorers, the columns, the command."""

from __future__ import annotations

import json

import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.evaluation.generated.answer_scores import contains, likely_scorer, score_answer, value_of
from unsloth_factory.evaluation.generated.generation_task import load_generation_task, read_problems
from unsloth_factory.evaluation.generated.generative import GenerativeOptions, evaluate_generated
from unsloth_factory.inference.generate import Generation


@pytest.mark.parametrize(
    ("answer", "reference", "held"),
    [
        ("应低盐饮食，按时服药。", "低盐饮食", True),
        ("应少盐饮食", "低盐饮食", False),
        ("饮食低盐", "低盐饮食", False),
        ("It takes 112 days.", "12", False),
        ("It takes 12 days.", "12", True),
        ("The CAPITAL is Paris.", "capital is paris", True),
        ("Parisian", "Paris", False),
        ("１２ 天", "12", True),
        ("", "x", False),
        ("x", "。", False),
    ],
)
def test_contains(answer, reference, held):
    assert contains(answer, reference) is held


def test_scores_take_the_best_of_several_references():
    given = score_answer("exact", "Beijing.", ("北京", "beijing"), None)
    assert (given["exact"], given["correct"], given["token F1"]) == (True, True, 1.0)
    given = score_answer("f1", "低盐", ("低盐饮食", "吃药"), None)
    assert value_of(given) == pytest.approx(2 * 2 / (2 + 4))
    assert "correct" not in given
    assert value_of(score_answer("contains", "是北京市", ("北京",), None)) == 1
    assert value_of(score_answer("exact", "是北京市", ("北京",), None)) == 0
    assert likely_scorer([("18",), ("1,200",), ("0.5",)]) == "number"
    assert likely_scorer([("18",), ("18 apples",)]) == "f1"


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_tables_are_told_apart(tmp_path):
    own = write(tmp_path, "qa.jsonl", [{"问题": "首都？", "答案": ["北京", "北京市"]}])
    task = load_generation_task(str(own))
    assert (task.scorer, task.columns, task.folder) == ("f1", {"question": "问题", "answer": "答案"}, str(tmp_path))
    problem = read_problems(task, tmp_path, "test")[0]
    assert (problem.references, problem.number) == (("北京", "北京市"), None)
    numbers = write(tmp_path, "sums.jsonl", [{"question": "1+1", "answer": 2}, {"question": "2+2", "answer": "4"}])
    assert load_generation_task(str(numbers)).scorer == "number"
    choice = write(tmp_path, "mc.jsonl", [{"question": "?", "A": "x", "B": "y", "answer": "A"}])
    assert load_generation_task(str(choice)) is None
    broken = write(tmp_path, "broken.jsonl", [{"question": "a", "answer": "b"}, {"question": "c", "answer": []}])
    with pytest.raises(UserError, match=r"broken\.jsonl:2: column answer is empty"):
        read_problems(load_generation_task(str(broken)), tmp_path, "test")


class Template:
    """One token a character."""

    def encode_prompt(self, turns, thinking):
        return [ord(char) for char in turns[-1].content]

    def decode_answer(self, ids, thinking):
        return None, "".join(map(chr, ids)), []


def test_the_report_of_shared_words_and_of_exact_answers(tmp_path):
    path = write(tmp_path, "qa.jsonl", [{"question": q, "answer": a} for q, a in (("甲", "低盐"), ("乙", "喝水"))])
    task = load_generation_task(str(path))

    def says(*answers):
        return lambda prompts: [Generation([ord(char) for char in text], True) for text in answers]

    answerers = {"base": says("高盐", "是喝水"), "tuned": says("低盐", "喝水。")}
    options = GenerativeOptions(n_shot=5, split="test", lang="zh")
    report = evaluate_generated(task, Template(), tmp_path, answerers, options).report
    assert (report.headline, report.notes) == ("token F1", ())
    assert report.metrics["base"]["token F1"].value == pytest.approx((0.5 + 0.8) / 2)
    assert report.metrics["base"]["contains the reference"].value == 0.5
    assert report.metrics["tuned"]["exact match"].value == 1
    assert report.comparisons["token F1"].delta == pytest.approx(0.35)
    from dataclasses import replace

    exact = evaluate_generated(replace(task, scorer="exact"), Template(), tmp_path, answerers, options).report
    assert (exact.headline, exact.metrics["base"]["accuracy"].value) == ("accuracy", 0)
    assert exact.comparisons["accuracy"].p_value == pytest.approx(0.5)


def test_through_the_command(tmp_path, random_model_dir, capsys):
    path = write(tmp_path, "qa.jsonl", [{"question": "你好", "answer": "你好。"}, {"question": "盐？", "answer": "少"}])
    config = EvaluateConfig(
        model=ModelSettings(model=str(random_model_dir)), task=str(path), max_new_tokens=4, scorer="contains",
        save_dir=str(tmp_path / "out"),
    )  # fmt: skip
    assert command.run(config) == 0
    report = json.loads((tmp_path / "out/qa.json").read_text(encoding="utf-8"))
    assert (report["n"], report["settings"]["scorer"], report["headline"]) == (2, "contains", "accuracy")
    assert "contains the reference" in capsys.readouterr().out
    choice = write(tmp_path, "mc.jsonl", [{"question": "?", "A": "x", "B": "y", "answer": "A"}])
    with pytest.raises(UsageError, match="--scorer is for questions with reference answers"):
        command.run(EvaluateConfig(task=str(choice), scorer="f1"))
    (tmp_path / "task.yaml").write_text(
        'kind: generate\nlayout: "{split}.jsonl"\nfolder: .\nscorer: vibes\n'
        'prompts: {en: {question: "{question}", answer: "{number}"}}\n'
    )
    with pytest.raises(UserError, match=r"task\.yaml, field scorer: number, exact, contains, f1, not 'vibes'"):
        load_generation_task(str(tmp_path / "task.yaml"))
