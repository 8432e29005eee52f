"""The table of shapes. A new shape is one file beside this one and one row here; the first that recognises wins."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.formats.alpaca import ALPACA
from unsloth_factory.data.formats.messages import MESSAGES, SHAREGPT
from unsloth_factory.data.formats.preference import PREFERENCE
from unsloth_factory.data.formats.question_answer import QUESTION_ANSWER
from unsloth_factory.data.formats.shape import Parsed, RowProblem, Shape, Tags

SHAPES: tuple[Shape, ...] = (PREFERENCE, SHAREGPT, MESSAGES, ALPACA, QUESTION_ANSWER)
BY_NAME: Mapping[str, Shape] = {shape.name: shape for shape in SHAPES}

__all__ = ["BY_NAME", "SHAPES", "Parsed", "RowProblem", "Shape", "Tags", "find_shape", "named_shape"]


def named_shape(name: str) -> Shape:
    """The shape of that name.

    Raises:
        UsageError: There is none; lists the known names.
    """
    if name not in BY_NAME:
        near = difflib.get_close_matches(name, BY_NAME, 1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"--dataset_format {name}: unknown. Known: auto, {', '.join(BY_NAME)}.{hint}")
    return BY_NAME[name]


def find_shape(columns: Sequence[str], path: Path) -> Shape:
    """The shape of a file with these columns.

    Raises:
        UserError: None fits; says what was found, what is known, and how to name the columns.
    """
    lower = frozenset(column.lower() for column in columns)
    for shape in SHAPES:
        if shape.recognises(lower):
            return shape
    known = "; ".join(f"{shape.name} ({shape.description})" for shape in SHAPES)
    raise UserError(
        f"{path}: the columns {', '.join(columns) or '(none)'} make no known shape.{_near_column(lower)} "
        f"Known: {known}. Name yours with --columns prompt=COLUMN,response=COLUMN."
    )


def _near_column(columns: frozenset[str]) -> str:
    """A hint for a misspelt column: the known name closest to one of the file's."""
    known = (
        "instruction",
        "output",
        "question",
        "answer",
        "conversations",
        "messages",
        "chosen",
        "rejected",
        "response",
    )
    for column in sorted(columns):
        near = difflib.get_close_matches(column, known, 1, cutoff=0.75)
        if near and near[0] not in columns:
            return f" Is {column!r} meant to be {near[0]!r}?"
    return ""
