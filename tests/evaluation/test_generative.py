"""GSM8K's way: exact numbers from the answer part alone, worked examples from train, base against tuned."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.evaluation.generated.generation_task import load_generation_task, read_problems
from unsloth_factory.evaluation.generated.generative import GenerativeOptions, evaluate_generated
from unsloth_factory.evaluation.generated.numbers import final_number
from unsloth_factory.inference.generate import Generation

THINK = "想"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("#### 1,234,567", 1234567),
        ("The answer is $18.00.", 18),
        ("The answer is: **-7** dollars", -7),
        ("3 apples, 5 pears. The answer is 8. That is 2 more than 6.", 8),
        ("The answer is 4. No: the answer is 5.", 5),
        ("答案是 １２。", 12),
        ("答案：0.5 千克", Fraction(1, 2)),
        (r"so \boxed{1/2}", Fraction(1, 2)),
        ("He has 48/2 = 24 clips, 24+48 = 72", 72),
        ("between 3-5", 5),
        ("it fell by -5", -5),
        ("x = -$5", -5),
        ("−3 °C", -3),
        ("costs $.50", Fraction(1, 2)),
        ("1, 2, 3", 3),
        ("1,2345", 2345),
        ("1/0", None),
        ("no number", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


class Template:
    """One token a character; what stands before 想 is reasoning, and without it everything is."""

    def encode_prompt(self, turns, thinking):
        return [ord(char) for char in "".join(f"<{turn.role}>{turn.content}" for turn in turns)]

    def decode_answer(self, ids, thinking):
        reasoning, mark, answer = "".join(map(chr, ids)).rpartition(THINK)
        return (reasoning, answer, []) if mark else (None, answer, []) if not thinking else (answer, "", [])


@pytest.fixture
def data(tmp_path):
    rows = {
        "train": [("shot0", "1+1=<<1+1=2>>2\n#### 2"), ("asked1", "leak\n#### 6"), ("shot2", "so\n#### 1,000")],
        "test": [("asked0", "x\n#### 5"), ("asked1", "x\n#### 6"), ("asked2", "x\n#### 7"), ("asked3", "x\n#### 8")],
    }
    for split, pairs in rows.items():
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def says(answers: list[str], seen: list[str] | None = None):
    def answer(prompts):
        if seen is not None:
            seen.extend("".join(map(chr, ids)) for ids in prompts)
        return [Generation([ord(char) for char in text], True) for text in answers]

    return answer


def test_scores_prompts_and_comparison(data):
    task, seen = load_generation_task("gsm8k"), []
    right = ["The answer is 5.", f"9{THINK}6", "#### 7.0", "it is 8"]
    wrong = ["The answer is 5.", f"6{THINK}none", "", "8 or 9"]
    result = evaluate_generated(
        task, Template(), data, {"base": says(wrong), "tuned": says(right, seen)}, GenerativeOptions(n_shot=5)
    )
    metrics = result.report.metrics
    assert metrics["tuned"]["accuracy"].value == 1
    assert metrics["base"]["accuracy"].value == 1 / 4
    assert metrics["base"]["answers with a number"].value == 2 / 4
    assert result.report.comparisons["accuracy"].p_value == pytest.approx(2 / 8)  # 3 of 3 heads
    assert [record["base"]["correct"] for record in result.records] == [True, False, False, False]
    assert result.records[1]["tuned"] == {
        "answer": "6", "reasoning": "9", "number": "6", "correct": True, "stopped": True, "tokens": 3
    }  # fmt: skip
    shot = "{}\nThink step by step. End with the line: The answer is NUMBER."
    assert seen[1] == "".join(
        [
            f"<user>{shot.format('shot0')}<assistant>1+1=2\nThe answer is 2.",
            f"<user>{shot.format('shot2')}<assistant>so\nThe answer is 1,000.",
            f"<user>{shot.format('asked1')}",
        ]
    )
    assert "2 are shown" in result.report.notes[0]
    json.dumps(result.report.to_dict(), allow_nan=False)


def test_a_reasoning_that_never_ends_is_no_answer(data):
    options = GenerativeOptions(n_shot=0, thinking=True, max_samples=1)
    result = evaluate_generated(load_generation_task("gsm8k"), Template(), data, {"base": says(["5"])}, options)
    assert result.report.metrics["base"]["accuracy"].value == 0
    assert result.report.n == 1
    assert result.report.notes == ()

    def cut(prompts):
        return [Generation([ord("5")], False)]

    report = evaluate_generated(load_generation_task("gsm8k"), Template(), data, {"base": cut}, options).report
    assert report.notes[0].startswith("base: 1 of 1 answers were cut off while still thinking")


def test_worked_examples_give_way_to_the_answer(data):
    task, seen = load_generation_task("gsm8k"), []
    options = GenerativeOptions(n_shot=1, max_new_tokens=100, max_tokens=200)
    result = evaluate_generated(task, Template(), data, {"base": says(["5"] * 4, seen)}, options)
    assert result.records[0]["shots"] == 0
    assert max(map(len, seen)) + 100 <= 200
    with pytest.raises(UserError, match="Give a smaller --max_new_tokens"):
        evaluate_generated(task, Template(), data, {}, GenerativeOptions(n_shot=1, max_new_tokens=190, max_tokens=200))


def test_broken_data_and_wrong_splits(data):
    task = load_generation_task("gsm8k")
    with pytest.raises(UsageError, match="--split val: gsm8k has test"):
        evaluate_generated(task, Template(), data, {}, GenerativeOptions(split="val"))
    (data / "test.jsonl").write_text('{"question": "a", "answer": "no mark 5"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.jsonl:1: the answer .* has no number behind '####'"):
        read_problems(task, data, "test")
    (data / "test.jsonl").write_text('{"q": "a", "answer": "#### 5"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="has no column question; it has: q, answer"):
        read_problems(task, data, "test")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("kind: dream", "field kind: generate"),
        ("max_new_tokens: 0", "field max_new_tokens"),
        ("prompts: {en: {question: x, answer: '{number}'}}", r"prompts\.en\.question: {question} is missing"),
        ("layuot: x", "field layuot: unknown. Did you mean layout"),
    ],
)
def test_a_wrong_yaml_names_file_and_field(tmp_path, line, message):
    lines = ["kind: generate", 'layout: "{split}.jsonl"', "prompts: {en: {question: '{question}', answer: '{number}'}}"]
    kept = [text for text in lines if not text.startswith(line.split(":")[0])]
    (tmp_path / "mine.yaml").write_text("\n".join([*kept, line]), encoding="utf-8")
    with pytest.raises(UserError, match=rf"mine\.yaml, (field )?{message}"):
        load_generation_task(str(tmp_path / "mine.yaml"))


def test_multiple_choice_is_not_taken_for_it():
    assert load_generation_task("ceval") is None
    assert load_generation_task("mine.csv") is None


def test_through_the_command(data, random_model_dir, tmp_path, capsys):
    out = tmp_path / "out"
    config = EvaluateConfig(
        model=ModelSettings(model=str(random_model_dir)), task="gsm8k", task_dir=str(data), n_shot=1,
        max_new_tokens=6, max_samples=3, save_dir=str(out),
    )  # fmt: skip
    assert command.run(config) == 0
    report = json.loads((out / "gsm8k.json").read_text(encoding="utf-8"))
    assert report["n"] == 3
    assert report["metrics"]["base"]["accuracy"]["value"] == 0
    assert len((out / "gsm8k_samples.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert "accuracy" in capsys.readouterr().out
    assert command.run(config) == 0
    assert "3 answers by the same model to the same prompts were there" in capsys.readouterr().out
    assert json.loads((out / "gsm8k.json").read_text(encoding="utf-8")) == report
    for change in ({"no_chat_template": True}, {"subjects": "x"}, {"max_samples": 0}, {"split": "val"}):
        with pytest.raises(UsageError):
            command.run(EvaluateConfig(task="gsm8k", task_dir=str(data), **change))
    with pytest.raises(UsageError, match="for generated answers"):
        command.run(EvaluateConfig(task="ceval", max_samples=5))


def test_gsm8k_as_published(shared_data):
    task = load_generation_task("gsm8k")
    problems = read_problems(task, shared_data / "gsm8k", "test")
    assert len(problems) == 300
    assert problems[0].number == 18
    assert "<<" not in "".join(problem.solution for problem in problems)
    assert len(read_problems(task, shared_data / "gsm8k", "train")) == 1000
