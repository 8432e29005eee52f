"""Questions of a benchmark from CSV files, in the layout in which the benchmark is published."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.evaluation.benchmark import Benchmark

ENCODINGS = ("utf-8-sig", "gb18030")
"""Tried in this order; GB18030 contains GBK, and UTF-8 is practically never valid by accident."""


@dataclass(frozen=True)
class Question:
    """One question with its options; `answer` is None where it is unknown or must not be read."""

    subject: str
    id: str
    text: str
    options: tuple[str, ...]
    answer: str | None


def read_questions(
    benchmark: Benchmark, folder: Path, subject: str, split: str, *, with_answers: bool = True
) -> list[Question]:
    """Read one subject's file.

    Args:
        benchmark: Says which file and columns.
        folder: Folder of the data.
        subject: Name of the subject.
        split: Name of the split.
        with_answers: False drops an answer column, should there be one, before anything sees it.

    Raises:
        UserError: The file is missing or empty, a column is missing, an option is empty or an answer is none of the
            letters; the file and row are named.
    """
    path = folder / benchmark.layout.format(split=split, subject=subject)
    if not path.is_file():
        raise UserError(f"{path} is missing. --task_dir must be the folder that holds {benchmark.layout}.")
    reader = csv.DictReader(io.StringIO(_decode(path), newline=""))
    roles = ["question", *benchmark.letters, *(["answer"] if with_answers else [])]
    missing = [benchmark.column(role) for role in roles if benchmark.column(role) not in (reader.fieldnames or [])]
    if missing:
        found = ", ".join(reader.fieldnames or []) or "none"
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has: {found}. Name the columns in the benchmark's YAML."
        )
    questions = []
    for number, row in enumerate(reader):
        if any(value and value.strip() for value in row.values() if isinstance(value, str)):
            questions.append(_question(benchmark, subject, path, number, row, with_answers))
    if not questions:
        raise UserError(f"{path} holds no questions.")
    return questions


def _question(
    benchmark: Benchmark, subject: str, path: Path, number: int, row: dict[str, str | None], with_answers: bool
) -> Question:
    def cell(role: str) -> str:
        return (row.get(benchmark.column(role)) or "").replace("\r\n", "\n").strip()

    where = f"{path}, row {number + 1}"
    for role in ("question", *benchmark.letters):
        if not cell(role):
            raise UserError(f"{where}: column {benchmark.column(role)} is empty.")
    answer = None
    if with_answers:
        answer = cell("answer").upper()
        if answer not in benchmark.letters:
            raise UserError(f"{where}: the answer {cell('answer')!r} is none of {', '.join(benchmark.letters)}.")
    options = tuple(cell(letter) for letter in benchmark.letters)
    return Question(subject, cell("id") or str(number), cell("question"), options, answer)


def _decode(path: Path) -> str:
    data = path.read_bytes()
    for encoding in ENCODINGS:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UserError(f"{path} is neither UTF-8 nor GBK/GB18030. Convert it to UTF-8.")
