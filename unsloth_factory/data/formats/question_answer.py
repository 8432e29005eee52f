"""One column with the question, one with the answer, under any of their usual names; title and reasoning if there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from unsloth_factory.data.formats.messages import refuse_media
from unsloth_factory.data.formats.shape import (
    Parsed,
    Shape,
    Tags,
    assistant_turn,
    optional_text,
    ordered,
    text_of,
    user_turn,
)
from unsloth_factory.data.types import Turn

# In order of preference, where a file has several.
_QUESTIONS = (
    "ask",
    "question",
    "prompt",
    "query",
    "problem",
    "instruction",
    "input",
    "user",
    "q",
    "问题",
    "提问",
    "问",
)
_ANSWERS = ("answer", "response", "completion", "output", "reply", "solution", "target", "assistant", "a")
_CHINESE_ANSWERS = ("回答", "答案", "回复", "答")
_REASONING = ("complex_cot", "reasoning", "reasoning_content", "cot", "think", "thinking", "思考")


def _pick(names: tuple[str, ...], columns: Collection[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _recognises(columns: frozenset[str]) -> bool:
    return None not in (_pick(_QUESTIONS, columns), _pick(_ANSWERS + _CHINESE_ANSWERS, columns))


def _question(row: Mapping[str, Any], name: str) -> str:
    """The question, opened by the title where it does not say the same already."""
    question = optional_text(row, name)
    title = optional_text(row, "title")
    return question if title in question else f"{title}\n{question}".strip()


def _parse(row: Mapping[str, Any], tags: Tags) -> Parsed:
    refuse_media(row)
    asked = _pick(_QUESTIONS, row) or "question"
    answered = _pick(_ANSWERS + _CHINESE_ANSWERS, row) or "answer"
    reasoned = _pick(_REASONING, row)
    answer = assistant_turn(text_of(row.get(answered), answered), optional_text(row, reasoned) if reasoned else None)
    system = optional_text(row, "system") or optional_text(row, "system_prompt")
    opening = [Turn("system", system)] if system else []
    return ordered([*opening, user_turn(_question(row, asked)), answer])


QUESTION_ANSWER = Shape(
    "qa",
    "question and answer (also ask/answer with title, prompt/response, query/response, input/output, 问题/回答; "
    "optional reasoning, Complex_CoT)",
    _recognises,
    _parse,
    {
        "prompt": "question",
        "response": "answer",
        "system": "system",
        "title": "title",
        "reasoning": "reasoning",
    },
)
