"""Alpaca: instruction, input, output; optional system and history, in both forms that are seen in the wild."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsloth_factory.data.formats.messages import read_messages, refuse_media
from unsloth_factory.data.formats.shape import (
    Parsed,
    RowProblem,
    Shape,
    Tags,
    assistant_turn,
    optional_text,
    ordered,
    text_of,
    user_turn,
)
from unsloth_factory.data.types import Turn


def read_history(value: Any, tags: Tags) -> list[Turn]:
    """Turns of a history: [[question, answer], ...], [{user, assistant}, ...], or a list of messages.

    Raises:
        RowProblem: None of these.
    """
    if value is None or value in ("", []):
        return []
    if not isinstance(value, list):
        raise RowProblem("history is not a list")
    if isinstance(value[0], Mapping) and "user" not in value[0]:
        return read_messages(value, tags, "history")
    turns = []
    for item in value:
        pair = [item.get("user"), item.get("assistant")] if isinstance(item, Mapping) else item
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowProblem("history holds something other than pairs of question and answer")
        turns += [user_turn(text_of(pair[0], "history")), assistant_turn(text_of(pair[1], "history"))]
    return turns


def read_prompt(row: Mapping[str, Any], tags: Tags) -> list[Turn]:
    """System, history and question of an alpaca row."""
    refuse_media(row)
    system = optional_text(row, "system")
    question = "\n".join(part for name in ("instruction", "input") if (part := optional_text(row, name)))
    history = read_history(row.get("history"), tags)
    return [*([Turn("system", system)] if system else []), *history, user_turn(question)]


def _parse(row: Mapping[str, Any], tags: Tags) -> Parsed:
    answer = assistant_turn(text_of(row.get("output"), "output"), optional_text(row, "reasoning"))
    return ordered([*read_prompt(row, tags), answer])


ALPACA = Shape(
    "alpaca",
    "instruction, input, output; optional system, history",
    lambda columns: {"instruction", "output"} <= columns,
    _parse,
    {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "system": "system",
        "history": "history",
        "reasoning": "reasoning",
    },
)
