"""Reasoning between <think> and </think>, in texts of data files, templates and models."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

from unsloth_factory.data.types import Conversation

OPEN, CLOSE = "<think>", "</think>"
OPEN_AT_END = re.compile(r"<think>\s*\Z")
EMPTY_AT_END = re.compile(r"<think>\s*</think>\s*\Z")


def split_thinking(text: str, *, opened: bool = False) -> tuple[str | None, str]:
    """(reasoning or None, answer) of a model's text.

    Args:
        text: What the model wrote.
        opened: The prompt had already opened the block (DeepSeek's distills), so that the text begins inside it.

    A block that is never closed is all reasoning: the answer is empty. Text before a lone </think> is reasoning too.
    """
    body = text.lstrip()
    inside = opened or body.startswith(OPEN)
    body = body.removeprefix(OPEN)
    reasoning, close, answer = body.partition(CLOSE)
    if close:
        return reasoning.strip() or None, answer.strip()
    return (body.strip() or None, "") if inside else (None, text.strip())


def thinking_mode(conversations: Iterable[Conversation]) -> Literal["on", "off"]:
    """The mode a run is trained in: "on" when more than half of the rows have reasoning, "off" otherwise."""
    flags = [any(turn.reasoning for turn in conversation.turns) for conversation in conversations]
    return "on" if 2 * sum(flags) > len(flags) else "off"
