"""Benchmarks as data: the published layouts of CMMLU and MMLU, a table without YAML, models with known scores."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.evaluation.choice.benchmark import load_benchmark
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.questions import read_questions
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, evaluate

LETTERS = "ABCD"
KEYS = {"anatomy": "BDAC", "virology": "AAD"}


class CharTokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}


class Turns:
    """A chat template of one character a control token."""

    control_tokens = ("<", ">")

    def render_prompt(self, turns, thinking):
        return "".join(f"<{turn.role}\n{turn.content}>" for turn in turns) + "<assistant\n"

    def encode_prompt(self, turns, thinking):
        return self.encode_text(self.render_prompt(turns, thinking))

    def encode_text(self, text):
        return [ord(char) for char in text]


def cmmlu(folder: Path) -> None:
    for subject, key in KEYS.items():
        for split, answers in (("dev", "CB"), ("test", key)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [f"{i},{subject}{split}{i}？,甲{i},乙{i},丙{i},丁{i},{a}" for i, a in enumerate(answers)]
            text = "\n".join([",Question,A,B,C,D,Answer", *rows]) + "\n"
            (folder / split / f"{subject}.csv").write_text(text, encoding="utf-8")


def mmlu(folder: Path) -> None:
    for subject, key in KEYS.items():
        for split, answers in (("dev", "CB"), ("test", key)):
            (folder / split).mkdir(parents=True, exist_ok=True)
            rows = [
                f'"{subject}{split}{i}; which, of these?",same{i},same{i},{i}0000,"so,{i}0",{a}'
                for i, a in enumerate(answers)
            ]
            (folder / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def table(folder: Path) -> None:
    rows = [f"q{i}?,甲{i},乙{i},丙{i},{a}" for i, a in enumerate("BCA")]
    (folder / "mine.csv").write_text("\n".join(["question,A,B,C,answer", *rows]) + "\n", encoding="utf-8")


def maker_of(name: str, template=None, mode="letter") -> PromptMaker:
    benchmark = load_benchmark(name)
    return PromptMaker(
        benchmark=benchmark,
        tokenizer=CharTokenizer(),
        template=template,
        lang=next(iter(benchmark.prompts)),
        mode="letter" if mode == "letter" else "text",
    )


def spy_on(seen: list[str], width: int = 4):
    def score(prompts, choices):
        seen.extend("".join(map(chr, ids)) for ids in prompts)
        return np.zeros((len(prompts), width))

    return score


@pytest.mark.parametrize(("name", "write"), [("cmmlu", cmmlu), ("mmlu", mmlu)])
def test_published_layouts(tmp_path, name, write):
    write(tmp_path)
    seen: list[str] = []
    options = ChoiceOptions(n_shot=2, subjects="anatomy,virology")
    result = evaluate(maker_of(name), tmp_path, {"base": spy_on(seen)}, options)
    assert result.report.settings["split"] == "test"
    assert [record["answer"] for record in result.records] == list("BDACAAD")
    assert {record["shots"] for record in result.records} == {2}
    assert result.report.metrics["base"]["micro accuracy"].value == 3 / 7  # zeros: the first letter
    if name == "mmlu":
        assert seen[1] == (
            "The following are multiple choice questions (with answers) about anatomy.\n\n"
            "anatomydev0; which, of these?\nA. same0\nB. same0\nC. 00000\nD. so,00\nAnswer: C\n\n"
            "anatomydev1; which, of these?\nA. same1\nB. same1\nC. 10000\nD. so,10\nAnswer: B\n\n"
            "anatomytest1; which, of these?\nA. same1\nB. same1\nC. 10000\nD. so,10\nAnswer:"
        )
    else:
        assert seen[0].startswith("以下是关于解剖学的单项选择题")
        assert seen[0].endswith("anatomytest0？\nA. 甲0\nB. 乙0\nC. 丙0\nD. 丁0\n答案：")


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("cmmlu", {"STEM": 17, "Humanities": 13, "Social Science": 22, "Other": 15}),
        ("mmlu", {"STEM": 19, "Humanities": 13, "Social Science": 12, "Other": 13}),
    ],
)
def test_subjects_and_groups(name, groups):
    subjects = load_benchmark(name).subjects
    assert Counter(subject.group for subject in subjects) == groups
    assert len({subject.name for subject in subjects}) == len(subjects)


def test_a_table_needs_no_yaml(tmp_path):
    table(tmp_path)
    path = str(tmp_path / "mine.csv")
    benchmark = load_benchmark(path)
    assert (benchmark.letters, benchmark.default_split) == (("A", "B", "C"), "test")
    seen: list[str] = []
    result = evaluate(maker_of(path), tmp_path, {"base": spy_on(seen, 3)}, ChoiceOptions())
    assert seen[0] == "q0?\nA. 甲0\nB. 乙0\nC. 丙0\n答案："
    assert result.report.metrics["base"]["micro accuracy"].value == 1 / 3
    assert result.report.settings["n_shot"] == 0
    assert result.report.notes == ()
    (tmp_path / "mine.csv").write_text("question,A,answer\nq,1,A\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.csv has no column B; it has: question, A, answer"):
        load_benchmark(path)
    with pytest.raises(UsageError, match="there is no such file"):
        load_benchmark(str(tmp_path / "none.csv"))


@pytest.mark.parametrize("template", [None, Turns()], ids=["plain", "chat"])
@pytest.mark.parametrize("mode", ["letter", "text", "text_normalized"])
@pytest.mark.parametrize(("name", "write"), [("cmmlu", cmmlu), ("mmlu", mmlu)])
def test_models_with_known_scores(tmp_path, name, write, template, mode):
    """Always A: the share of A. The key: 1. Random: exactly what its recorded letters score."""
    write(tmp_path)
    picks: list[int] = []
    rng = np.random.default_rng(5)

    def always_a(prompts, choices):
        return np.array([[0.0, -1.0, -1.0, -1.0]] * len(prompts))

    def knows(prompts, choices):
        asked = [re.findall(r"(anatomy|virology)test(\d)", "".join(map(chr, ids))) for ids in prompts]
        right = [LETTERS.index(KEYS[found[-1][0]][int(found[-1][1])]) for found in asked]
        return np.log(np.eye(4)[right] * 0.9 + 0.01)

    def at_random(prompts, choices):
        scores = -rng.random(size=(len(prompts), 4))
        picks.extend(scores.argmax(axis=1).tolist())
        return scores

    options = ChoiceOptions(n_shot=2, subjects="anatomy,virology", per_character=mode == "text_normalized")
    scorers = {"base": always_a, "tuned": knows, "random": at_random}
    metrics = evaluate(maker_of(name, template, mode), tmp_path, scorers, options).report.metrics
    assert metrics["base"]["micro accuracy"].value == pytest.approx(3 / 7)
    assert metrics["base"]["macro accuracy"].value == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert {metric.value for metric in metrics["tuned"].values()} == {1.0}
    right = [LETTERS[pick] == answer for pick, answer in zip(picks, "BDACAAD", strict=True)]
    assert metrics["random"]["micro accuracy"].value == pytest.approx(sum(right) / 7)
    assert metrics["random"]["macro accuracy"].value == pytest.approx((sum(right[:4]) / 4 + sum(right[4:]) / 3) / 2)


def test_a_random_model_scores_chance_on_many_questions(tmp_path):
    """C-Eval's shape with 52 x 100 questions: within four standard errors of 1/4, and the error is the binomial one."""
    rng = np.random.default_rng(0)
    benchmark = load_benchmark("ceval")
    for subject in benchmark.subjects:
        (tmp_path / "val").mkdir(exist_ok=True)
        rows = [f"{i},q{i},1,2,3,4,{LETTERS[k]}" for i, k in enumerate(rng.integers(0, 4, size=100))]
        text = "\n".join(["id,question,A,B,C,D,answer", *rows])
        (tmp_path / f"val/{subject.name}_val.csv").write_text(text, encoding="utf-8")
    scorers = {"base": lambda prompts, choices: rng.normal(size=(len(prompts), 4))}
    metric = evaluate(maker_of("ceval"), tmp_path, scorers, ChoiceOptions(n_shot=0)).report.metrics["base"]
    micro = metric["micro accuracy"]
    assert abs(micro.value - 0.25) < 4 * micro.standard_error
    assert micro.standard_error == pytest.approx((0.25 * 0.75 / 5200) ** 0.5, rel=0.05)


@pytest.mark.parametrize("template", [None, Turns()], ids=["plain", "chat"])
def test_shots_never_hold_the_scored_question_nor_answers_of_the_test_split(tmp_path, template):
    header = "id,question,A,B,C,D,answer\n"
    shots = "".join(f"{i},shot{i},1,2,3,4,B\n" for i in range(3)) + "3,val1,1,2,3,4,C\n4,test0,4,3,2,1,C\n"
    asked = {
        "val": "0,val0,1,2,3,4,A\n1,val1,1,2,3,4,C\n",
        "test": "0,test0,1,2,3,4,☠POISON\n1,test1,1,2,3,4,☠POISON\n",
    }
    for split, body in {"dev": shots, **asked}.items():
        (tmp_path / split).mkdir()
        (tmp_path / split / f"logic_{split}.csv").write_text(header + body, encoding="utf-8")
    for split, shown in (("val", {"val0", "val1"}), ("test", {"test0", "test1"})):
        seen: list[str] = []
        options = ChoiceOptions(n_shot=5, split=split, subjects="logic")
        result = evaluate(maker_of("ceval", template), tmp_path, {"base": spy_on(seen)}, options)
        assert "☠" not in "".join(seen) + str(result)
        assert all(sum(text.count(f"{question}\n") for question in shown) == 1 for text in seen)
        assert all(text.count("shot") == 3 for text in seen)
    assert result.submissions == {"base": {"logic": {"0": "A", "1": "A"}}}
    questions = read_questions(load_benchmark("ceval"), tmp_path, "logic", "test", with_answers=False)
    assert [question.answer for question in questions] == [None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("letters: 5", "field letters: a list is expected, not 5"),
        ("version: [1]", "field version: a whole number is expected"),
        ("layout: 7", "field layout: a text is expected, not 7"),
        ("columns: [a]", "field columns: a mapping is expected"),
        ("header: [question, A]", "field header: no column for B, C, D"),
        ("scored_splits: []", "field scored_splits: at least one"),
        ("prompts: {zh: five}", r"field prompts\.zh: keys and values are expected, not 'five'"),
        ("prompts: {zh: {intro: 5, question: x}}", r"field prompts\.zh\.intro: a text is expected, not 5"),
        ("subjects: {a: 5}", r"field subjects\.a: keys and values are expected"),
    ],
)
def test_a_wrong_yaml_names_file_and_field(tmp_path, line, message):
    lines = ['layout: "{split}/{subject}.csv"', 'prompts: {zh: {intro: "", question: "{question}{choices}"}}']
    kept = [text for text in lines if not text.startswith(line.split(":")[0])]
    (tmp_path / "toy.yaml").write_text("\n".join([*kept, line]), encoding="utf-8")
    with pytest.raises(UserError, match=rf"toy\.yaml, {message}"):
        load_benchmark(str(tmp_path / "toy.yaml"))


def test_text_mode_scores_the_options_texts_without_listing_them(tmp_path):
    table(tmp_path)
    (tmp_path / "dev").mkdir()
    (tmp_path / "val").mkdir()
    text = (tmp_path / "mine.csv").read_text(encoding="utf-8")
    (tmp_path / "val/x.csv").write_text(text, encoding="utf-8")
    (tmp_path / "dev/x.csv").write_text(
        text.replace("q", "dev q").replace("dev question", "question"), encoding="utf-8"
    )
    (tmp_path / "toy.yaml").write_text(
        'layout: "{split}/{subject}.csv"\nletters: [A, B, C]\n'
        'prompts: {zh: {intro: "", question: "{question}\\n{choices}\\n答：", delimiter: "~"}}',
        encoding="utf-8",
    )
    plain = maker_of(str(tmp_path / "toy.yaml"))
    maker = PromptMaker(benchmark=plain.benchmark, tokenizer=CharTokenizer(), template=None, mode="text")
    calls = []

    def score(prompts, choices):
        calls.append((["".join(map(chr, ids)) for ids in prompts], choices))
        return np.array([[-4.0, -2.0, -6.0]] * len(prompts))

    result = evaluate(maker, tmp_path, {"base": score}, ChoiceOptions(n_shot=1))
    assert calls[0][0][0] == "dev q0?\n答：~乙0\n\nq0?\n答："
    assert ["".join(map(chr, ids)) for ids in calls[0][1][0]] == ["~甲0", "~乙0", "~丙0"]
    assert result.report.settings["choice_mode"] == "text"
    assert [record["base"]["choice"] for record in result.records] == ["B", "B", "B"]
    chat = PromptMaker(benchmark=plain.benchmark, tokenizer=CharTokenizer(), template=Turns(), mode="text")
    evaluate(chat, tmp_path, {"base": score}, ChoiceOptions(n_shot=1))
    assert calls[1][0][0] == "<user\ndev q0?\n答：><assistant\n乙0><user\nq0?\n答：><assistant\n"
    assert ["".join(map(chr, ids)) for ids in calls[1][1][0]] == ["甲0", "乙0", "丙0"]


def test_text_normalized_divides_by_characters(tmp_path):
    (tmp_path / "mine.csv").write_text("question,A,B,answer\nq,短,长长长长,B\n", encoding="utf-8")
    path = str(tmp_path / "mine.csv")
    scorers = {"base": lambda prompts, choices: np.array([[-2.0, -3.0]])}
    plain = evaluate(maker_of(path), tmp_path, scorers, ChoiceOptions())
    assert plain.records[0]["base"]["choice"] == "A"
    result = evaluate(maker_of(path), tmp_path, scorers, ChoiceOptions(per_character=True))
    assert result.records[0]["base"] == {"logprobs": {"A": -2.0, "B": -3.0}, "choice": "B", "correct": True}
    assert result.report.settings["choice_mode"] == "text_normalized"
