"""The demo's data: the handbook of an invented hospital as training lines and held-out test questions."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from bundled_model.relations import RELATIONS
from bundled_model.world import DEMO_NAMES, Fact, make_fact

SEED = 20240607


def demo_facts() -> list[tuple[str, Fact]]:
    """All facts of the handbook with their ids, such as ("department_place-1", Fact)."""
    random = Random(SEED)
    return [
        (f"{relation.name}-{number}", make_fact(name, relation, random))
        for kind, names in DEMO_NAMES.items()
        for number, name in enumerate(names, start=1)
        for relation in RELATIONS[kind]
    ]


def training_lines() -> list[dict[str, str]]:
    """Alpaca rows: each fact in the seven `trained` frames of its relation, shuffled."""
    rows = [
        {"instruction": frame.format(e=fact.entity), "input": "", "output": fact.answer}
        for _, fact in demo_facts()
        for frame in fact.relation.trained
    ]
    Random(SEED + 1).shuffle(rows)
    return rows


def test_questions() -> list[dict[str, str]]:
    """Each fact in the four `held_out` frames of its relation."""
    return [
        {"id": f"{fact_id}-{index}", "fact": fact_id, "question": frame.format(e=fact.entity), "answer": fact.answer}
        for fact_id, fact in demo_facts()
        for index, frame in enumerate(fact.relation.held_out, start=1)
    ]


def write_handbook(folder: Path) -> None:
    """Write handbook_train.jsonl and handbook_questions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("handbook_train.jsonl", training_lines()), ("handbook_questions.jsonl", test_questions())):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text(text, encoding="utf-8")
