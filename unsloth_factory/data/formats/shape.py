"""What a shape is: how rows of it are recognised and read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from unsloth_factory.data.types import Role, Turn

ROLES: Mapping[str, Role] = {
    **dict.fromkeys(("user", "human", "client", "prompter", "seeker", "patient", "用户"), "user"),
    **dict.fromkeys(("assistant", "gpt", "counselor", "bot", "model", "chatgpt", "doctor", "助手"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
}
_THINK = re.compile(r"\s*<think>(.*?)</think>(.*)\Z", re.DOTALL)


class RowProblem(ValueError):
    """Why one row cannot be used; counted in the report, never fatal by itself."""


@dataclass(frozen=True)
class Tags:
    """Names inside a list of messages (LLaMA-Factory's `tags`); empty means: found by the usual names."""

    role: str = ""
    content: str = ""
    roles: Mapping[str, Role] = field(default_factory=dict)
    """The file's own role names."""


@dataclass(frozen=True)
class Parsed:
    """One row: the turns, and for a preference the two answers to them."""

    turns: tuple[Turn, ...]
    chosen: Turn | None = None
    rejected: Turn | None = None
    merged: int = 0
    """Turns that were joined to the one before, which had the same role."""


@dataclass(frozen=True)
class Shape:
    """One row of the table of shapes."""

    name: str
    description: str
    """Its columns, for messages."""
    recognises: Callable[[frozenset[str]], bool]
    """Whether a file with these columns (lower case) has this shape."""
    parse: Callable[[Mapping[str, Any], Tags], Parsed]
    """A row (keys in lower case) to turns; raises RowProblem."""
    roles: Mapping[str, str]
    """`--columns` role -> the column's name in this shape."""
    preference: bool = False


def text_of(value: Any, name: str) -> str:
    """A scalar as text; int and float become their digits.

    Raises:
        RowProblem: null, a truth value, a list or an object.
    """
    if isinstance(value, str):
        return value.strip()
    if value is None or value != value:
        raise RowProblem(f"{name} is missing")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    raise RowProblem(f"{name} is a {type(value).__name__}, not text")


def optional_text(row: Mapping[str, Any], name: str) -> str:
    """Text of a column that may be missing or null; then ""."""
    value = row.get(name)
    return "" if value is None or value != value else text_of(value, name)


def user_turn(text: str) -> Turn:
    """A user's turn.

    Raises:
        RowProblem: It is empty.
    """
    if not text.strip():
        raise RowProblem("empty question")
    return Turn("user", text.strip())


def assistant_turn(text: str, reasoning: str | None = None) -> Turn:
    """An assistant's turn; a <think> block at its beginning becomes the reasoning.

    Raises:
        RowProblem: The answer is empty, or the block is never closed.
    """
    match = _THINK.match(text)
    if match:
        block, text = match.groups()
        reasoning = reasoning or block
    elif text.lstrip().startswith("<think>"):
        raise RowProblem("<think> without </think>")
    if not text.strip():
        raise RowProblem("empty answer")
    return Turn("assistant", text.strip(), (reasoning or "").strip() or None)


def turn_of(role: Role, text: str, reasoning: str | None = None) -> Turn:
    """A turn of any role, checked."""
    if role == "assistant":
        return assistant_turn(text, reasoning)
    if role == "user":
        return user_turn(text)
    return Turn(role, text.strip())


def without_empty_system(turns: list[Turn]) -> list[Turn]:
    """The turns without system turns that say nothing."""
    return [turn for turn in turns if turn.role != "system" or turn.content]


def ordered(turns: list[Turn], *, ends_with: Role = "assistant") -> Parsed:
    """Turns checked for order: [system] user assistant user assistant ...; tools may stand where a user stands.

    Turns of the same role that follow one another are joined by a blank line. What comes after the last turn of
    `ends_with` is dropped: nobody answered it.

    Raises:
        RowProblem: The order is wrong; says which rule.
    """
    merged: list[Turn] = []
    for turn in without_empty_system(turns):
        if merged and merged[-1].role == turn.role and turn.role != "system":
            before = merged.pop()
            reasoning = "\n\n".join(part for part in (before.reasoning, turn.reasoning) if part) or None
            turn = Turn(turn.role, f"{before.content}\n\n{turn.content}", reasoning)
        merged.append(turn)
    joined = len(without_empty_system(turns)) - len(merged)
    body = merged[1:] if merged and merged[0].role == "system" else merged
    if any(turn.role == "system" for turn in body):
        raise RowProblem("a system turn that is not the first turn")
    if ends_with == "assistant" and not any(turn.role == "assistant" for turn in body):
        raise RowProblem("no assistant turn")
    while body and body[-1].role != ends_with and not (ends_with == "user" and body[-1].role == "tool"):
        body = body[:-1]
    if not body:
        raise RowProblem("no user turn")
    if body[0].role != "user":
        raise RowProblem(f"the first turn is the {body[0].role}'s, not the user's")
    return Parsed((*merged[: len(merged) and merged[0].role == "system"], *body), merged=joined)
