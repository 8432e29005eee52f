"""Preferences: a prompt in any form with a chosen and a rejected answer in any form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsloth_factory.data.formats.alpaca import read_prompt
from unsloth_factory.data.formats.messages import has_messages, list_column, read_messages, refuse_media, with_system
from unsloth_factory.data.formats.shape import (
    Parsed,
    RowProblem,
    Shape,
    Tags,
    assistant_turn,
    ordered,
    text_of,
    without_empty_system,
)
from unsloth_factory.data.types import Turn

_CHOSEN = ("chosen", "response_chosen")
_REJECTED = ("rejected", "response_rejected")
_PROMPTS = ("prompt", "question", "query", "instruction")


def _answer(row: Mapping[str, Any], names: tuple[str, ...], tags: Tags) -> list[Turn]:
    """The answer's turns: one, or a whole conversation that ends in it."""
    name = next((name for name in names if name in row), names[0])
    value = row.get(name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return [assistant_turn(text_of(value, name))]
    turns = without_empty_system(read_messages(value, tags, name))
    if not turns or turns[-1].role != "assistant":
        raise RowProblem(f"{name} does not end with the assistant's turn")
    return turns


def _prompt(row: Mapping[str, Any], tags: Tags) -> list[Turn] | None:
    """The turns before the answers; None when only the answers hold them."""
    if has_messages(frozenset(row)):
        name = list_column(row)
        return with_system(row, read_messages(row[name], tags, name))
    column = next((name for name in _PROMPTS if name in row), None)
    if column is None:
        return None
    if isinstance(row[column], list):
        return with_system(row, read_messages(row[column], tags, column))
    return read_prompt({**row, "instruction": row[column]}, tags)


def _parse(row: Mapping[str, Any], tags: Tags) -> Parsed:
    refuse_media(row)
    chosen, rejected = _answer(row, _CHOSEN, tags), _answer(row, _REJECTED, tags)
    prompt = _prompt(row, tags)
    # Full conversations on both sides carry the prompt themselves, whether there is a prompt column or not.
    if len(chosen) > 1 or prompt is None:
        if chosen[:-1] != rejected[:-1]:
            raise RowProblem("chosen and rejected answer different prompts")
        prompt = with_system(row, chosen[:-1])
    if chosen[-1] == rejected[-1]:
        raise RowProblem("chosen equals rejected")
    opening = ordered(prompt, ends_with="user")
    return Parsed(opening.turns, chosen[-1], rejected[-1], merged=opening.merged)


def _recognises(columns: frozenset[str]) -> bool:
    return not columns.isdisjoint(_CHOSEN) and not columns.isdisjoint(_REJECTED)


PREFERENCE = Shape(
    "preference",
    "chosen and rejected, with conversations, prompt or question (also response_chosen/response_rejected)",
    _recognises,
    _parse,
    {
        "prompt": "prompt",
        "query": "input",
        "messages": "conversations",
        "chosen": "chosen",
        "rejected": "rejected",
        "system": "system",
        "history": "history",
    },
    preference=True,
)
