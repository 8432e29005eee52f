"""Benchmarks whose answers are generated: YAML with `kind: generate`, or a table of questions and reference answers.

The comments of `benchmarks/gsm8k.yaml` explain the keys. A table needs a column of questions and one of answers; in
JSON an answer may be a list, of which any counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.readers import read_table
from unsloth_factory.data.readers.table import Table
from unsloth_factory.evaluation.choice.benchmark import TABLES, build, read_yaml
from unsloth_factory.evaluation.generated.answer_scores import SCORERS, Scorer, likely_scorer
from unsloth_factory.evaluation.generated.numbers import final_number

QUESTIONS = ("question", "prompt", "query", "ask", "instruction", "问题")
ANSWERS = ("answer", "reference", "response", "output", "答案", "回答")
"""Names of a table's columns, in order of preference."""
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True, kw_only=True)
class GenerationPrompt:
    """What is asked in one language, and how a worked example answers."""

    question: str
    """Holds {question}."""
    answer: str
    """Holds {solution} and {number}, the reference answer whatever it is."""


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """A benchmark of questions with reference answers."""

    kind: str
    name: str
    version: int
    title: str
    layout: str
    """Path of a file below the benchmark's folder, with {split}."""
    prompts: Mapping[str, GenerationPrompt]
    """By language."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """role (question, answer) -> column."""
    answer_mark: str = "####"
    """In the reference, between the solution and the number; empty where the reference is the number."""
    shots_split: str = "train"
    scored_splits: tuple[str, ...] = ("test",)
    max_new_tokens: int = 512
    """Longest answer, tokens."""
    scorer: Scorer = "number"
    folder: str | None = None
    """Default folder of the data, relative to the YAML file."""


@dataclass(frozen=True)
class Problem:
    """A question, the way to its answer, and the answer."""

    source: str
    question: str
    solution: str
    written: str
    """The answer as the reference writes it."""
    number: Fraction | None
    """None where it is no number that is asked for."""
    references: tuple[str, ...] = ()


def load_generation_task(name_or_path: str) -> GenerationTask | None:
    """Read a built-in benchmark by name, a YAML file or a table; None where it is one of multiple choice.

    Raises:
        UsageError: No such benchmark.
        UserError: The file is broken: it is named, with the field.
    """
    if name_or_path.endswith(TABLES):
        return _table_task(Path(name_or_path).expanduser())
    path, values = read_yaml(name_or_path)
    if "kind" not in values:
        return None
    if values["kind"] != "generate":
        raise UserError(f"{path}, field kind: generate, or no such key for multiple choice; not {values['kind']!r}.")
    values = {"name": path.stem, "version": 1, "title": path.stem, **values}
    prompts = values.get("prompts")
    if not isinstance(prompts, dict) or not prompts:
        raise UserError(
            f"{path}, field prompts: one prompt by language is needed (zh or en), with question and answer."
        )
    values["prompts"] = {
        lang: build(GenerationPrompt, path, f"prompts.{lang}", value) for lang, value in prompts.items()
    }
    values["scored_splits"] = tuple(map(str, values.get("scored_splits") or ["test"]))
    if values.get("folder"):
        values["folder"] = str((path.parent / str(values["folder"])).resolve())
    task: GenerationTask = build(GenerationTask, path, "", values)
    if task.scorer not in SCORERS:
        raise UserError(f"{path}, field scorer: {', '.join(SCORERS)}, not {task.scorer!r}.")
    for lang, prompt in task.prompts.items():
        for name, text, marks in (
            ("question", prompt.question, ["{question}"]),
            ("answer", prompt.answer, ["{number}"]),
        ):
            if not isinstance(text, str) or any(mark not in text for mark in marks):
                raise UserError(f"{path}, field prompts.{lang}.{name}: {' '.join(marks)} is missing.")
    if not isinstance(task.max_new_tokens, int) or task.max_new_tokens < 1:
        raise UserError(f"{path}, field max_new_tokens: a whole number from 1 on, not {task.max_new_tokens!r}.")
    return task


def _table_task(path: Path) -> GenerationTask | None:
    """The task of a table alone; None where its columns are those of multiple choice, or the file is not there."""
    if not path.is_file():
        return None
    table = read_table(path)
    names = {"question": _first(QUESTIONS, table), "answer": _first(ANSWERS, table)}
    if None in names.values() or {"A", "B"} & set(table.columns):
        return None
    columns = {role: str(name) for role, name in names.items()}
    references = [_references(row.get(columns["answer"])) for row in table.readable()]
    prompt = GenerationPrompt(question="{question}", answer="{number}")
    return GenerationTask(
        kind="generate",
        name=path.stem,
        version=1,
        title=path.stem,
        layout=path.name,
        prompts={"zh": prompt, "en": prompt},
        columns=columns,
        answer_mark="",
        shots_split="",
        scorer=likely_scorer(references),
        folder=str(path.parent.resolve()),
    )


def _first(names: Sequence[str], table: Table) -> str | None:
    return next((name for name in names if name in table.columns), None)


def _references(cell: Any) -> tuple[str, ...]:
    """What a cell accepts: one text, or each of a list."""
    items = cell if isinstance(cell, list) else [cell]
    return tuple(str(item).strip() for item in items if item is not None and str(item).strip())


def read_problems(task: GenerationTask, folder: Path, split: str) -> list[Problem]:
    """Read one split.

    Raises:
        UserError: The file or a column is missing, a cell is empty or a reference has no number to compare.
    """
    path = folder / task.layout.format(split=split)
    if not path.is_file():
        raise UserError(f"{path} is missing. --task_dir must be the folder that holds {task.layout}.")
    table = read_table(path)
    names = {role: task.columns.get(role, role) for role in ("question", "answer")}
    missing = [name for name in names.values() if name not in table.columns]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; it has: {', '.join(table.columns) or 'none'}.")
    problems = []
    for row in table.rows:
        if row.values is None:
            raise UserError(f"{path}, row {row.number}: {row.problem}. A benchmark is scored whole or not at all.")
        problems.append(_problem(task, row.values, names, f"{path.name}:{row.number}"))
    return problems


def _problem(task: GenerationTask, values: Mapping[str, Any], names: Mapping[str, str], source: str) -> Problem:
    question = str(values.get(names["question"]) or "").strip()
    references = _references(values.get(names["answer"]))
    for role, filled in (("question", question), ("answer", references)):
        if not filled:
            raise UserError(f"{source}: column {names[role]} is empty.")
    reference = references[0]
    if task.scorer != "number":
        return Problem(source, question, "", reference, None, references)
    solution, mark, written = reference.rpartition(task.answer_mark) if task.answer_mark else ("", "", reference)
    number = final_number(written)
    if number is None or mark != task.answer_mark:
        raise UserError(f"{source}: the answer {reference[-60:]!r} has no number behind {task.answer_mark!r}.")
    return Problem(source, question, _CALCULATOR.sub("", solution).strip(), written.strip(), number, references)


def check_split(task: GenerationTask, split: str, n_shot: int) -> None:
    """Refuse a split that is not scored.

    Raises:
        UsageError: It is unknown, or the worked examples come from it.
    """
    if split not in task.scored_splits:
        raise UsageError(f"--split {split}: {task.name} has {', '.join(task.scored_splits)}.")
    if split == task.shots_split and n_shot:
        raise UsageError(f"--split {split} is where the worked examples come from. Give --n_shot 0.")
