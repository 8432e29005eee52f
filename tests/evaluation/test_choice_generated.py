"""Generated letters: models with known scores, prompts, unparsed answers, and answers that are kept."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.evaluation.choice.benchmark import load_benchmark
from unsloth_factory.evaluation.choice.generated import evaluate_choices_generated
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions
from unsloth_factory.evaluation.generated.kept_answers import KeptAnswers
from unsloth_factory.inference.generate import Generation

KEYS = {"herbs": "ACDBBADC", "bones": "AAB"}
THINK = "想"


class Template:
    """One token a character; what stands before 想 is reasoning, and with thinking on and without 想 all is."""

    control_tokens = ()

    def encode_prompt(self, turns, thinking):
        return [ord(char) for char in self.render_prompt(turns, thinking)]

    def render_prompt(self, turns, thinking):
        return "".join(f"<{turn.role}>{turn.content}" for turn in turns)

    def decode_answer(self, ids, thinking):
        reasoning, mark, answer = "".join(map(chr, ids)).rpartition(THINK)
        if mark:
            return reasoning, answer, []
        return (answer, "", []) if thinking else (None, answer, [])


@pytest.fixture
def task(tmp_path) -> Path:
    """Two subjects of eight and three questions; worked examples in dev, answers that nobody may read in test."""
    for split in ("dev", "val", "test"):
        (tmp_path / split).mkdir()
        for subject, key in KEYS.items():
            rows = [
                [f"{subject}{split}{i}？", *(f"{x}甲{i}" for x in "ABCD"), answer]
                for i, answer in enumerate(key if split == "val" else "BA")
            ]
            with open(tmp_path / split / f"{subject}.csv", "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([["question", *"ABCD", "answer"], *rows])
    (tmp_path / "toy.yaml").write_text(
        'title: Toy\nlayout: "{split}/{subject}.csv"\nfolder: .\nsubmission_splits: [test]\n'
        "subjects: {herbs: {zh: 草药, group: Plants}, bones: {zh: 骨骼}}\n"
        'prompts:\n  zh: {intro: "关于{subject}。\\n", question: "{question}\\n{choices}\\n答案："}\n'
        '  en: {intro: "", question: "{question}\\n{choices}\\nAnswer:"}\n',
        encoding="utf-8",
    )
    return tmp_path / "toy.yaml"


def says(answer_of, seen: list[str] | None = None):
    """A model that answers the question at the end of its prompt."""

    def answer(prompts):
        texts = ["".join(map(chr, ids)) for ids in prompts]
        if seen is not None:
            seen.extend(texts)
        answers = [answer_of(text.rpartition("<user>")[2].split("？")[0].split("\n")[-1]) for text in texts]
        return [Generation([ord(char) for char in text], True) for text in answers]

    return answer


def ask(task: Path, answerers, *, thinking=False, lang="zh", room=50, **options):
    maker = PromptMaker(
        benchmark=load_benchmark(str(task)), tokenizer=None, template=Template(), thinking=thinking, lang=lang,
        mode="generate",
    )  # fmt: skip
    return evaluate_choices_generated(maker, task.parent, answerers, ChoiceOptions(**options), room=room)


def right(question: str) -> str:
    subject, _, number = question.partition("val")
    return KEYS[subject][int(number)]


def test_always_a_the_key_and_chance_score_exactly(task):
    draws = random.Random(3)
    drawn = {f"{s}val{i}": draws.choice("ABCD") for s, key in KEYS.items() for i in range(len(key))}
    result = ask(
        task,
        {
            "base": says(lambda question: "**A**"),
            "tuned": says(lambda question: f"我选 {right(question)}。"),
            "random": says(lambda question: f"The answer is ({drawn[question]})."),
        },
        n_shot=2,
    )
    base, tuned = result.report.metrics["base"], result.report.metrics["tuned"]
    assert base["micro accuracy"].value == pytest.approx(4 / 11)
    assert base["macro accuracy"].value == pytest.approx((2 / 8 + 2 / 3) / 2)
    assert base["Plants"].value == pytest.approx(2 / 8)
    assert {name: metric.value for name, metric in tuned.items()} == dict.fromkeys(tuned, 1.0)
    hits = sum(letter == right(question) for question, letter in drawn.items())
    assert 0 < hits < 11
    assert result.report.metrics["random"]["micro accuracy"].value == pytest.approx(hits / 11)
    details = result.report.details
    assert details["chosen_letters"]["base"] == {"A": 11, "B": 0, "C": 0, "D": 0, "none": 0}
    assert details["always_the_same_letter"]["A"]["micro"] == pytest.approx(4 / 11)
    assert result.report.comparisons["micro accuracy"].verdict == "better"
    assert (result.report.headline, result.report.notes) == ("macro accuracy", ())
    json.dumps(result.report.to_dict(), allow_nan=False)


def test_letters_come_from_the_answer_part_and_unparsed_answers_count_apart(task):
    answers = {"bonesval0": f"答案是B{THINK}答案是A", "bonesval1": "答案是A", "bonesval2": f"B{THINK}A 或 B"}
    result = ask(task, {"base": says(answers.__getitem__)}, thinking=True, n_shot=0, subjects="bones")
    given = [record["base"] for record in result.records]
    assert [(answer["choice"], answer["correct"]) for answer in given] == [("A", True), (None, False), (None, False)]
    assert (given[0]["reasoning"], given[0]["answer"]) == ("答案是B", "答案是A")
    assert result.report.metrics["base"]["macro accuracy"].value == pytest.approx(1 / 3)
    assert result.report.metrics["base"]["answers with one letter"].value == pytest.approx(1 / 3)
    assert result.report.details["unparsed"] == {"base": 2}
    assert result.report.details["subjects"]["bones"]["unparsed"] == {"base": 2}
    assert result.report.notes[0] == "base: 2 of 3 answers name no single letter and count as wrong."


def test_what_is_asked(task):
    seen: list[str] = []
    ask(task, {"base": says(lambda question: "A", seen)}, n_shot=1, subjects="bones")
    request = "请选出正确答案，并在最后一行写出：答案：X（X 是选项字母）。"
    options = "\n".join(f"{x}. {x}甲0" for x in "ABCD")
    assert seen[0] == (
        f"<user>关于骨骼。\nbonesdev0？\n{options}\n\n{request}<assistant>答案：B<user>bonesval0？\n{options}\n\n{request}"
    )
    english: list[str] = []
    ask(task, {"base": says(lambda question: "A", english)}, n_shot=1, subjects="bones", lang="en")
    assert "<assistant>Answer: B<user>bonesval0" in english[0]
    assert english[0].endswith("Answer: X, where X is its letter.")
    shorter: list[str] = []
    result = ask(
        task, {"base": says(lambda question: "A", shorter)}, n_shot=1, subjects="bones", room=60, max_tokens=160
    )
    assert max(map(len, shorter)) <= 100
    assert result.records[0]["shots"] == 0
    with pytest.raises(UserError, match="an answer of 60 tokens fills the model's context of 60"):
        ask(task, {}, room=60, max_tokens=60)


def test_a_split_without_answers_gives_letters_for_the_server(task):
    result = ask(task, {"base": says(lambda question: "B" if "0" in question else "?")}, split="test", n_shot=1)
    assert result.submissions == {"base": {"herbs": {"0": "B", "1": ""}, "bones": {"0": "B", "1": ""}}}
    assert "correct" not in result.records[0]["base"]
    assert "macro accuracy" not in result.report.metrics["base"]


class Counting:
    """Answers with the length of the prompt, and is stopped at the call of that number."""

    def __init__(self, stop: int | None = None) -> None:
        self.prompts, self.calls, self._stop = 0, 0, stop

    def __call__(self, prompts):
        self.calls += 1
        if self.calls == self._stop:
            raise KeyboardInterrupt
        self.prompts += len(prompts)
        return [Generation([len(prompt), prompt[0]], len(prompt) % 2 == 0) for prompt in prompts]


def test_a_stopped_run_goes_on_and_what_has_changed_is_answered_anew(tmp_path):
    prompts = [[7] * length for length in (3, 9, 1, 5, 9, 2)]  # one comes twice
    whole = [Generation([len(prompt), 7], len(prompt) % 2 == 0) for prompt in prompts]
    first, seen = Counting(stop=3), []
    with pytest.raises(KeyboardInterrupt):
        KeptAnswers(tmp_path, "m", {"longest": 5}, chunk=2).complete(first, prompts)
    assert first.prompts == 4
    kept = KeptAnswers(tmp_path, "m", {"longest": 5}, chunk=2)
    second = Counting()
    assert kept.complete(second, prompts, lambda done, total: seen.append((done, total))) == whole
    assert (second.prompts, kept.found, seen) == (1, 5, [(6, 6)])
    for model, settings in (("n", {"longest": 5}), ("m", {"longest": 6})):
        other = Counting()
        assert KeptAnswers(tmp_path, model, settings).complete(other, prompts) == whole
        assert other.prompts == 5
    # A line that was cut by a kill, and one that is of nobody knows what.
    text = kept.path.read_text(encoding="utf-8")
    kept.path.write_text(text[:-9], encoding="utf-8")
    third = Counting()
    assert KeptAnswers(tmp_path, "m", {"longest": 5}).complete(third, prompts) == whole
    assert third.prompts == 1
    assert sorted(kept.path.read_text(encoding="utf-8").splitlines()) == sorted(text.splitlines())
    kept.path.write_text(text.replace('"stopped": true', '"stopped": 1', 1) + '{"ids": [1], "stopped": true}\n[]\n')
    fourth = Counting()
    assert KeptAnswers(tmp_path, "m", {"longest": 5}).complete(fourth, prompts) == whole
    assert fourth.prompts == 1


def test_through_the_command(task, random_model_dir, tmp_path, capsys, monkeypatch):
    def run(**change):
        config = EvaluateConfig(
            model=ModelSettings(model=str(random_model_dir)), task=str(task), choice_mode="generate", n_shot=1,
            max_new_tokens=5, save_dir=str(tmp_path / "out"), **change,
        )  # fmt: skip
        assert command.run(config) == 0
        lines = (tmp_path / "out/toy_generated_samples.jsonl").read_text(encoding="utf-8").splitlines()
        return json.loads((tmp_path / "out/toy_generated.json").read_text(encoding="utf-8")), list(
            map(json.loads, lines)
        )

    report, records = run()
    assert report["n"] == len(records) == 11
    assert report["settings"]["choice_mode"] == "generate"
    assert report["details"]["unparsed"]["base"] == sum(record["base"]["choice"] is None for record in records)
    printed = capsys.readouterr().out
    assert "answers with one letter" in printed
    assert "were there" not in printed
    again, same = run()
    assert (again, same) == (report, records)
    assert "11 answers by the same model to the same prompts were there" in capsys.readouterr().out
    thoughtful, _ = run(think_chain=True, thinking_budget=4, subjects="bones")
    assert thoughtful["settings"]["thinking_budget"] == 4
    assert "were there" not in capsys.readouterr().out
    monkeypatch.setattr("unsloth_factory.commands.evaluating.free.load_source", lambda *_: pytest.fail("loaded"))
    for change, message in (
        ({"no_chat_template": True}, "needs the chat template"),
        ({"max_samples": 3}, "--subjects takes a part"),
        ({"thinking_budget": 0}, "--thinking_budget 0"),
        ({"thinking_budget": 9, "think_chain": False}, "for answers with thinking"),
        ({"subjects": "herb"}, "Did you mean herbs"),
    ):
        with pytest.raises(UsageError, match=message):
            run(**change)
    with pytest.raises(UsageError, match="are for generated answers"):
        command.run(EvaluateConfig(task=str(task), thinking_budget=5))
