"""Benchmarks whose answers are generated: YAML with `kind: generate`, questions with a number as their answer.

The comments of `benchmarks/gsm8k.yaml` explain the keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.readers import read_table
from unsloth_factory.evaluation.benchmark import TABLES, build, read_yaml
from unsloth_factory.evaluation.numbers import final_number

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True, kw_only=True)
class GenerationPrompt:
    """What is asked in one language, and how a worked example answers."""

    question: str
    """Holds {question}."""
    answer: str
    """Holds {solution} and {number}."""


@dataclass(frozen=True, kw_only=True)
class GenerationTask:
    """A benchmark of questions whose answer is one number."""

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


@dataclass(frozen=True)
class Problem:
    """A question, the way to its answer, and the answer."""

    source: str
    question: str
    solution: str
    written: str
    """The number as the reference writes it."""
    number: Fraction


def load_generation_task(name_or_path: str) -> GenerationTask | None:
    """Read a built-in benchmark by name or a YAML file; None where it is one of multiple choice.

    Raises:
        UsageError: No such benchmark.
        UserError: The file is broken: it is named, with the field.
    """
    if name_or_path.endswith(TABLES):
        return None
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
    task: GenerationTask = build(GenerationTask, path, "", values)
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


def read_problems(task: GenerationTask, folder: Path, split: str) -> list[Problem]:
    """Read one split.

    Raises:
        UserError: The file or a column is missing, a cell is empty or a reference has no number.
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
    question, reference = (str(values.get(names[role]) or "").strip() for role in ("question", "answer"))
    if not question:
        raise UserError(f"{source}: column {names['question']} is empty.")
    solution, mark, written = reference.rpartition(task.answer_mark) if task.answer_mark else ("", "", reference)
    number = final_number(written)
    if number is None or mark != task.answer_mark:
        raise UserError(f"{source}: the answer {reference[-60:]!r} has no number behind {task.answer_mark!r}.")
    return Problem(source, question, _CALCULATOR.sub("", solution).strip(), written.strip(), number)


def check_split(task: GenerationTask, split: str, n_shot: int) -> None:
    """Refuse a split that is not scored.

    Raises:
        UsageError: It is unknown, or the worked examples come from it.
    """
    if split not in task.scored_splits:
        raise UsageError(f"--split {split}: {task.name} has {', '.join(task.scored_splits)}.")
    if split == task.shots_split and n_shot:
        raise UsageError(f"--split {split} is where the worked examples come from. Give --n_shot 0.")
