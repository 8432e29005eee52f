"""Questions of a benchmark from its files, in the layout in which it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers import Row, read_table
from unsloth_factory.evaluation.choice.benchmark import Benchmark


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
    table = read_table(path, header=benchmark.header or None)
    for row in table.rows:
        if row.problem:
            raise UserError(f"{path}, row {row.number}: {row.problem}. A benchmark is scored whole or not at all.")
    roles = ["question", *benchmark.letters, *(["answer"] if with_answers else [])]
    missing = [benchmark.column(role) for role in roles if benchmark.column(role) not in table.columns]
    if missing:
        found = ", ".join(table.columns) or "none"
        raise UserError(
            f"{path} has no column {', '.join(missing)}; it has: {found}. Name the columns in the benchmark's YAML."
        )
    return [_question(benchmark, subject, place, row, with_answers) for place, row in enumerate(table.rows)]


def _question(benchmark: Benchmark, subject: str, place: int, row: Row, with_answers: bool) -> Question:
    values = row.values or {}

    def cell(role: str) -> str:
        value = values.get(benchmark.column(role))
        return "" if value is None else str(value).replace("\r\n", "\n").strip()

    where = f"{benchmark.name}, {subject}, row {row.number}"
    for role in ("question", *benchmark.letters):
        if not cell(role):
            raise UserError(f"{where}: column {benchmark.column(role)} is empty.")
    answer = None
    if with_answers:
        answer = cell("answer").upper()
        if answer not in benchmark.letters:
            raise UserError(f"{where}: the answer {cell('answer')!r} is none of {', '.join(benchmark.letters)}.")
    options = tuple(cell(letter) for letter in benchmark.letters)
    return Question(subject, cell("id") or str(place), cell("question"), options, answer)
