"""Multiple choice: models with known scores, shots from dev alone, averages and errors by hand, broken files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.evaluation.averages import compare, compare_accuracies, macro_metric, mean_metric
from unsloth_factory.evaluation.choice.benchmark import Subject, load_benchmark, select_subjects
from unsloth_factory.evaluation.choice.prompts import PromptMaker, continuations
from unsloth_factory.evaluation.choice.questions import Question, read_questions
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, evaluate, logits_scorer
from unsloth_factory.evaluation.report import Metric

LETTERS = "ABCD"
KEY = "ACDBBADC"


class CharTokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8", newline: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator=newline)
        writer.writeheader()
        writer.writerows(rows)


def rows(answers: str, topic: str, **extra: str) -> list[dict]:
    return [
        {"id": str(i), "question": f"{topic}第{i}题____。", **{x: f"选项{x}{i}" for x in LETTERS}, "answer": a, **extra}
        for i, a in enumerate(answers)
    ]


@pytest.fixture
def bench(tmp_path):
    """A benchmark of two subjects of its own, in a YAML file of its own."""
    values = {
        "title": "Toy",
        "layout": "{split}/{subject}.csv",
        "prompts": {"zh": {"intro": "关于{subject}的题。\n\n", "question": "{question}\n{choices}\n答案："}},
        "subjects": {"herbs": {"zh": "草药", "group": "Plants"}, "bones": {"zh": "骨骼", "group": "Bodies"}},
        "hard": ["bones"],
        "scored_splits": ["val"],
        "submission_splits": ["test"],
    }
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(values, allow_unicode=True, sort_keys=False), encoding="utf-8")
    for subject, key in (("herbs", KEY), ("bones", "AAB")):
        write_csv(tmp_path / f"dev/{subject}.csv", rows("BA", f"{subject}例"))
        write_csv(tmp_path / f"val/{subject}.csv", rows(key, subject))
        write_csv(tmp_path / f"test/{subject}.csv", rows(key, f"{subject}测"))
    return load_benchmark(str(tmp_path / "toy.yaml")), tmp_path


def maker_of(benchmark, **settings) -> PromptMaker:
    return PromptMaker(benchmark=benchmark, tokenizer=CharTokenizer(), template=None, **settings)


def text_of(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def always(letter: str):
    return lambda prompts, choices: np.array([[0.0 if x == letter else -9.0 for x in LETTERS] for _ in prompts])


def knows(key: dict[str, str]):
    """Says the right letter, found by the question at the end of the prompt."""

    def score(prompts, choices):
        scores = np.full((len(prompts), 4), -5.0)
        for row, ids in enumerate(prompts):
            question = text_of(ids).split("\n")[-6]
            scores[row, LETTERS.index(key[question])] = -0.1
        return scores

    return score


KEY_OF_TOY = {f"{s}第{i}题____。": a for s, key in (("herbs", KEY), ("bones", "AAB")) for i, a in enumerate(key)}


def test_always_a_scores_the_share_of_a_and_the_key_scores_one(bench):
    benchmark, folder = bench
    scorers = {"base": always("A"), "tuned": knows(KEY_OF_TOY)}
    result = evaluate(maker_of(benchmark), folder, scorers, ChoiceOptions(n_shot=2))
    base, tuned = result.report.metrics["base"], result.report.metrics["tuned"]
    assert base["micro accuracy"].value == pytest.approx(4 / 11)
    assert base["macro accuracy"].value == pytest.approx((2 / 8 + 2 / 3) / 2)
    assert base["Plants"].value == pytest.approx(2 / 8)
    assert base["hard"].value == pytest.approx(2 / 3)
    assert {metric.value for metric in tuned.values()} == {1.0}
    assert (result.report.headline, result.report.notes) == ("macro accuracy", ())
    details = result.report.details
    assert details["subjects"]["herbs"]["standard_errors"] == {"base": pytest.approx(math.sqrt(3 / 16 / 7)), "tuned": 0}
    assert details["chosen_letters"] == {
        "base": {"A": 11, "B": 0, "C": 0, "D": 0},
        "tuned": {"A": 4, "B": 3, "C": 2, "D": 2},
    }
    assert details["always_the_same_letter"]["A"]["micro"] == pytest.approx(4 / 11)
    assert result.report.comparisons["micro accuracy"].verdict == "better"
    json.dumps(result.report.to_dict(), allow_nan=False)


def test_records_hold_every_question_with_prompt_hash_and_log_probs(bench):
    benchmark, folder = bench
    result = evaluate(maker_of(benchmark), folder, {"base": always("B")}, ChoiceOptions(n_shot=1))
    assert [(r["subject"], r["id"]) for r in result.records] == [("herbs", str(i)) for i in range(8)] + [
        ("bones", str(i)) for i in range(3)
    ]
    record = result.records[0]
    assert record["answer"] == "A"
    assert record["base"] == {"logprobs": {"A": -9.0, "B": 0.0, "C": -9.0, "D": -9.0}, "choice": "B", "correct": False}
    assert len({r["prompt_sha256"] for r in result.records}) == 11
    assert result.submissions == {}


def test_the_official_prompt(bench):
    benchmark, folder = bench
    seen = []

    def spy(prompts, choices):
        seen.extend(zip(prompts, choices, strict=True))
        return np.zeros((len(prompts), 4))

    evaluate(maker_of(benchmark), folder, {"base": spy}, ChoiceOptions(n_shot=1, subjects="herbs"))
    ids, choices = seen[0]
    assert text_of(ids) == (
        "关于草药的题。\n\n"
        "herbs例第0题____。\nA. 选项A0\nB. 选项B0\nC. 选项C0\nD. 选项D0\n答案：B\n\n"
        "herbs第0题____。\nA. 选项A0\nB. 选项B0\nC. 选项C0\nD. 选项D0\n答案："
    )
    assert choices == [[ord(letter)] for letter in LETTERS]


def test_more_shots_than_there_are_says_so(bench):
    benchmark, folder = bench
    result = evaluate(maker_of(benchmark), folder, {"base": always("A")}, ChoiceOptions(n_shot=5))
    assert "5 worked examples were asked for; 2 of 2 subjects have fewer" in result.report.notes[0]
    assert result.report.details["subjects"]["herbs"]["shots"] == 2
    result = evaluate(maker_of(benchmark), folder, {"base": always("A")}, ChoiceOptions(n_shot=2))
    assert result.report.notes == ()


def test_a_scored_question_is_never_shown_with_its_answer(bench):
    benchmark, folder = bench
    leak = rows(KEY, "herbs")
    write_csv(folder / "dev/herbs.csv", leak)
    shown = []

    def spy(prompts, choices):
        shown.extend(map(text_of, prompts))
        return np.zeros((len(prompts), 4))

    evaluate(maker_of(benchmark), folder, {"base": spy}, ChoiceOptions(n_shot=5))
    assert all(text.count("herbs第") <= 1 for text in shown)
    assert any("bones例" in text for text in shown)
    assert not any("herbs例" in text for text in shown)


def test_shots_are_taken_away_when_the_context_is_short(bench):
    benchmark, folder = bench
    maker = maker_of(benchmark)
    one = len(
        maker.encode(Subject(name="herbs"), [], [Question("herbs", "0", "herbs第0题____。", ("选项A0",) * 4, None)])[
            0
        ].ids
    )
    options = ChoiceOptions(n_shot=2, subjects="herbs", max_tokens=int(2.5 * one))
    result = evaluate(maker, folder, {"base": always("A")}, options)
    assert result.report.details["subjects"]["herbs"]["shots"] == 1
    assert "Fewer worked examples than asked for fit" in result.report.notes[0]
    assert result.report.notes[-1].startswith("1 of 2 subjects: averages over a part do not compare")
    lengths = []

    def spy(prompts, choices):
        lengths.extend(len(p) + 1 for p in prompts)
        return np.zeros((len(prompts), 4))

    options = ChoiceOptions(n_shot=2, subjects="herbs", max_tokens=20)
    result = evaluate(maker, folder, {"base": spy}, options)
    assert max(lengths) == 20
    assert "8 questions are longer than the context of 20 tokens" in result.report.notes[1]


def test_the_test_split_reads_no_answer_and_makes_a_submission(bench):
    benchmark, folder = bench
    write_csv(folder / "test/herbs.csv", rows("????", "herbs测"))  # would be refused if it were read
    result = evaluate(maker_of(benchmark), folder, {"base": always("C")}, ChoiceOptions(split="test"))
    assert result.submissions == {"base": {"herbs": dict.fromkeys("0123", "C"), "bones": dict.fromkeys("012", "C")}}
    assert result.report.metrics == {"base": {}}
    assert all("answer" not in record and "correct" not in record["base"] for record in result.records)
    assert "always_the_same_letter" not in result.report.details


def test_standard_errors_by_hand():
    correct = [1.0] * 3 + [0.0] * 7
    metric = mean_metric(correct)
    assert metric.value == pytest.approx(0.3)
    assert metric.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert mean_metric([1.0]) == Metric(1.0, 0.0, 1)
    macro = macro_metric([Metric(0.2, 0.03, 10), Metric(0.6, 0.04, 20)])
    assert (macro.value, macro.standard_error, macro.n) == (pytest.approx(0.4), pytest.approx(0.025), 30)


def test_a_difference_inside_the_error_is_not_called_an_improvement():
    subjects = [Subject(name="one")]
    base = {"one": np.array([0.0] * 5 + [1.0] * 3 + [0.0] * 92)}
    tuned = {"one": np.array([1.0] * 5 + [0.0] * 3 + [0.0] * 92)}
    comparison = compare_accuracies(subjects, base, tuned)["micro accuracy"]
    assert comparison.delta == pytest.approx(0.02)
    assert comparison.p_value == pytest.approx(93 * 2 / 256)  # 2 * P(at most 3 of 8 heads)
    assert comparison.verdict == "no difference beyond the error"
    tuned = {"one": np.array([1.0] * 30 + [0.0] * 70)}
    comparisons = compare_accuracies(subjects, base, tuned)
    assert {c.verdict for c in comparisons.values()} == {"better"}
    assert {c.verdict for c in compare_accuracies(subjects, tuned, base).values()} == {"worse"}
    assert {c.p_value for c in compare_accuracies(subjects, tuned, tuned).values()} == {1.0}


def test_a_verdict_knows_which_direction_is_good():
    assert compare(0.5, 0.2, 0.01, 0.001, better="lower").verdict == "better"
    assert compare(0.5, 0.2, 0.01, 0.2, better="lower").verdict == "no difference beyond the error"
    assert compare(0.5, 0.52, 0.1, 0.001).verdict == "no difference beyond the error"
    assert compare(10, 90, 1, None, better="neutral").verdict == ""


def test_continuations_keep_what_all_choices_share():
    merges = {"：A": 900, "：B": 901}

    def encode(text: str) -> list[int]:
        if text[-2:] in merges:
            return [ord(c) for c in text[:-2]] + [merges[text[-2:]]]
        return [ord(c) for c in text]

    prompt = [1, 2, *encode("答案：")]
    assert continuations(encode, prompt, "答案：", ["A", "B"]) == (
        [1, 2, ord("答"), ord("案")],
        [[900], [901]],
    )
    assert continuations(encode, prompt, "答案：", ["C", "DE"]) == (prompt, [[ord("C")], [ord("D"), ord("E")]])
    assert continuations(encode, prompt, "something else", ["A"]) is None
    assert continuations(encode, prompt, "", ["A", "B"]) == (prompt, [[ord("A")], [ord("B")]])


def test_logits_scorer_sums_over_the_tokens_of_a_choice_and_reads_each_at_once():
    after = {9: np.log([0.1, 0.2, 0.7]), 2: np.log([0.5, 0.25, 0.25]) + 3}
    calls = []

    def tail_logits(ids, last):
        calls.append((ids, last))
        return np.array([after[token] for token in ids[-last:]], dtype=np.float32)

    scores = logits_scorer(tail_logits)([[4, 9]], [[[1], [2, 0], [2, 1]]])
    np.testing.assert_allclose(scores, [[math.log(0.2), math.log(0.7 * 0.5), math.log(0.7 * 0.25)]], rtol=1e-6)
    assert calls == [([4, 9], 1), ([4, 9, 2], 2)]


@pytest.mark.parametrize(("encoding", "newline"), [("utf-8-sig", "\r\n"), ("gbk", "\n"), ("gb18030", "\r\n")])
def test_files_in_other_encodings(bench, encoding, newline):
    benchmark, folder = bench
    plain = read_questions(benchmark, folder, "herbs", "val")
    write_csv(folder / "val/herbs.csv", rows(KEY, "herbs"), encoding, newline)
    assert read_questions(benchmark, folder, "herbs", "val") == plain
    assert plain[1] == Question("herbs", "1", "herbs第1题____。", tuple(f"选项{x}1" for x in LETTERS), "C")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), r"herbs\.csv is missing\. --task_dir must be"),
        (lambda path: path.write_text("id,frage,A,B,C,D\n1,2,3,4,5,6\n"), "has no column question, answer; it has: id"),
        (
            lambda path: path.write_text("question,A,B,C,D,answer\nq,1,2,3,4,E\n"),
            "the answer 'E' is none of A, B",
        ),
        (lambda path: path.write_text("question,A,B,C,D,answer\nq,1,2,,4,A\n"), "column C is empty"),
        (lambda path: path.write_text("question,A,B,C,D,answer\nq,1,2,3\n"), "4 fields where the header has 6"),
        (lambda path: path.write_text("question,A,B,C,D,answer\n"), "herbs.csv"),
        (lambda path: path.write_text(""), "herbs.csv is empty"),
    ],
)
def test_broken_files_are_named_before_anything_is_scored(bench, change, message):
    benchmark, folder = bench
    change(folder / "val/herbs.csv")
    with pytest.raises(UserError, match=message):
        evaluate(maker_of(benchmark), folder, {"base": lambda *_: pytest.fail("scored")}, ChoiceOptions())


def test_subjects_are_chosen_by_name_or_found_in_the_folder(bench, tmp_path):
    benchmark, folder = bench
    assert [s.name for s in select_subjects(benchmark, folder, "val", "bones, herbs")] == ["bones", "herbs"]
    with pytest.raises(UsageError, match=r"--subjects herb: .* Did you mean herbs\?"):
        select_subjects(benchmark, folder, "val", "herb")
    values = yaml.safe_load((folder / "toy.yaml").read_text(encoding="utf-8"))
    del values["subjects"], values["hard"]
    (folder / "found.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    found = load_benchmark(str(folder / "found.yaml"))
    assert [s.name for s in select_subjects(found, folder, "val", None)] == ["bones", "herbs"]
    with pytest.raises(UserError, match="holds no val/SUBJECT.csv"):
        select_subjects(found, tmp_path / "dev", "val", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layuot": "x"}, "field layuot: unknown. Did you mean layout"),
        ({"layout": "x.csv"}, "field layout: x.csv must hold {subject} once"),
        ({"prompts": {"zh": {"intro": "", "question": "{question}"}}}, "prompts.zh.question: {choices} is missing"),
        ({"prompts": None}, "field prompts"),
        ({"hard": ["nobody"]}, "field hard: nobody"),
        ({"letters": ["A"]}, "at least two"),
        ({"shots_as": "turn"}, "turns or prompt, not turn"),
        ({"prompts": {"zh": {"intro": ""}}}, "missing 1 required"),
    ],
)
def test_broken_benchmark_files(bench, change, message):
    _, folder = bench
    values = yaml.safe_load((folder / "toy.yaml").read_text(encoding="utf-8")) | change
    (folder / "toy.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(UserError, match=message.replace("{", r"\{").replace("}", r"\}")):
        load_benchmark(str(folder / "toy.yaml"))


def test_unknown_names(bench):
    benchmark, folder = bench
    with pytest.raises(UsageError, match="Did you mean ceval"):
        load_benchmark("cevl")
    with pytest.raises(UsageError, match="--lang en: toy has prompts in zh"):
        benchmark.prompt("en")
    with pytest.raises(UsageError, match="--split train: toy has val, test"):
        evaluate(maker_of(benchmark), folder, {}, ChoiceOptions(split="train"))


def test_ceval_names_52_subjects_in_four_groups():
    subjects = load_benchmark("ceval").subjects
    counts = {group: sum(s.group == group for s in subjects) for group in {s.group for s in subjects}}
    assert counts == {"STEM": 20, "Social Science": 10, "Humanities": 11, "Other": 11}
    assert sum(s.hard for s in subjects) == 8
    assert all(s.titles["zh"] and s.titles["en"] for s in subjects)
    assert len({s.titles["zh"] for s in subjects}) == 52


def test_ceval_as_published(shared_data):
    benchmark = load_benchmark("ceval")
    folder = shared_data / "ceval"
    result = evaluate(maker_of(benchmark), folder, {"base": always("A")}, ChoiceOptions(n_shot=5))
    assert result.report.n == 1346
    assert result.report.metrics["base"]["micro accuracy"].value == 310 / 1346
    assert result.report.notes == ()
    assert {record["shots"] for record in result.records} == {5}
    on_disk = {path.name.removesuffix("_val.csv") for path in (folder / "val").glob("*.csv")}
    assert on_disk == {subject.name for subject in benchmark.subjects}
