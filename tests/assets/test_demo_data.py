"""The demo's data: generator and files agree, test questions are held out, mini C-Eval has C-Eval's layout."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from bundled_model.corpus import Mix
from bundled_model.handbook import demo_facts, write_handbook
from bundled_model.relations import RELATIONS
from bundled_model.world import DEMO_NAMES, NAME_FIRST, NAME_SECOND

DEMO = Path(__file__).resolve().parents[2] / "unsloth_factory" / "assets" / "demo"
SUBJECTS = ("basic_medicine", "computer_network", "education_science", "law")


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").splitlines()]


def test_generator_reproduces_the_committed_files(tmp_path: Path) -> None:
    write_handbook(tmp_path)
    for name in ("handbook_train.jsonl", "handbook_questions.jsonl"):
        assert (tmp_path / name).read_bytes() == (DEMO / name).read_bytes(), name


def test_counts() -> None:
    per_answer = Counter(row["output"] for row in rows("handbook_train.jsonl"))
    assert len(per_answer) >= 30
    assert min(per_answer.values()) >= 6
    assert len(rows("handbook_questions.jsonl")) >= 120


def test_no_test_question_is_a_training_line() -> None:
    trained = {row["instruction"] for row in rows("handbook_train.jsonl")}
    questions = [row["question"] for row in rows("handbook_questions.jsonl")]
    assert len(set(questions)) == len(questions)
    assert not trained & set(questions)


def test_every_tested_fact_is_in_the_training_lines() -> None:
    trained = {row["output"] for row in rows("handbook_train.jsonl")}
    assert all(row["answer"] in trained for row in rows("handbook_questions.jsonl"))
    assert {row["fact"] for row in rows("handbook_questions.jsonl")} == {fact_id for fact_id, _ in demo_facts()}


@pytest.mark.parametrize("relation", [r for group in RELATIONS.values() for r in group], ids=lambda r: r.name)
def test_frames_are_disjoint(relation) -> None:
    assert len(set(relation.frames)) == len(relation.frames)
    assert len(relation.held_out) >= 4
    assert all(frame.count("{e}") == 1 for frame in relation.frames)


def test_questions_of_different_relations_differ() -> None:
    for relations in RELATIONS.values():
        frames = [frame for relation in relations for frame in relation.frames]
        assert len(set(frames)) == len(frames)


def test_pretraining_never_sees_a_demo_entity() -> None:
    stems = {name[:2] for names in DEMO_NAMES.values() for name in names}
    assert all(stem[0] in NAME_FIRST and stem[1] in NAME_SECOND for stem in stems)
    assert not stems & {name[:2] for name in Mix([]).names}


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize(("split", "count"), [("dev", 5), ("val", 20)])
def test_mini_ceval_layout(subject: str, split: str, count: int) -> None:
    with (DEMO / "mini_ceval" / split / f"{subject}_{split}.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["id", "question", *"ABCD", "answer", *(["explanation"] if split == "dev" else [])]
    assert [row["id"] for row in table] == [str(number) for number in range(count)]
    assert all(len({row[letter] for letter in "ABCD"}) == 4 and all(row.values()) for row in table)
    letters = Counter(row["answer"] for row in table)
    assert set(letters) == set("ABCD")
    assert max(letters.values()) <= (2 if split == "dev" else 5)


def test_mini_ceval_shares_no_question_between_splits() -> None:
    questions = [
        row["question"]
        for path in sorted((DEMO / "mini_ceval").glob("*/*.csv"))
        for row in csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    ]
    assert len(questions) == 100
    assert len(set(questions)) == len(questions)
