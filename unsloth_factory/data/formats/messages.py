"""Lists of messages: ShareGPT (conversations, from/value), OpenAI (messages, role/content), dialogue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unsloth_factory.data.formats.shape import ROLES, Parsed, RowProblem, Shape, Tags, optional_text, ordered, turn_of
from unsloth_factory.data.types import Turn

_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_LIST_COLUMNS = ("messages", "conversations", "conversation", "dialogue", "dialog")


def read_messages(value: Any, tags: Tags, name: str) -> list[Turn]:
    """Turns of one list of messages, in the file's order.

    Raises:
        RowProblem: Not a list of objects, an unknown role, or a content that is not text.
    """
    if not isinstance(value, list):
        raise RowProblem(f"{name} is not a list of messages")
    turns = []
    for message in value:
        if not isinstance(message, Mapping):
            raise RowProblem(f"{name} holds a {type(message).__name__}, not a message")
        role = _first(message, (tags.role, *_ROLE_KEYS))
        if message.get("tool_calls") or role == "function_call":
            raise RowProblem("tool calls are not supported")
        known = {**ROLES, **tags.roles}
        if not isinstance(role, str) or (role not in known and role.lower() not in known):
            raise RowProblem(f"unknown role {role!r}")
        reasoning = _first(message, _REASONING_KEYS)
        text = _content(_first(message, (tags.content, *_CONTENT_KEYS)))
        turns.append(turn_of(known.get(role) or known[role.lower()], text, _content(reasoning) if reasoning else None))
    return turns


def _first(message: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((message[key] for key in keys if key in message), None)


def _content(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            raise RowProblem("a message with something other than text")
        return "\n".join(part["text"] for part in value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowProblem("a message without text")


def list_column(row: Mapping[str, Any]) -> str:
    """The column that holds the messages."""
    return next((name for name in _LIST_COLUMNS if name in row), _LIST_COLUMNS[0])


def has_messages(columns: frozenset[str]) -> bool:
    """Whether one of the columns is a list of messages by its name."""
    return not columns.isdisjoint(_LIST_COLUMNS)


def with_system(row: Mapping[str, Any], turns: list[Turn]) -> list[Turn]:
    """The turns with the row's own system column, if any, in front."""
    system = optional_text(row, "system")
    return [Turn("system", system), *turns] if system else turns


def refuse_media(row: Mapping[str, Any]) -> None:
    """Rows with pictures or sound need another kind of model.

    Raises:
        RowProblem: The row has some.
    """
    for name in ("images", "image", "videos", "audios"):
        if row.get(name):
            raise RowProblem(f"{name} need a vision or audio model")


def _parse(row: Mapping[str, Any], tags: Tags) -> Parsed:
    refuse_media(row)
    name = list_column(row)
    return ordered(with_system(row, read_messages(row.get(name), tags, name)))


def _recognises(columns: frozenset[str]) -> bool:
    return has_messages(columns) and "chosen" not in columns


_COLUMN_ROLES = {"messages": "messages", "system": "system", "images": "images"}

SHAREGPT = Shape(
    "sharegpt",
    "conversations: [{from, value}, ...] (also dialogue); optional system",
    lambda columns: _recognises(columns) and "messages" not in columns,
    _parse,
    _COLUMN_ROLES,
)
MESSAGES = Shape("messages", "messages: [{role, content}, ...]; optional system", _recognises, _parse, _COLUMN_ROLES)
