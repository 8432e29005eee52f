"""A judge's reply -> scores or a winner; None where it does not say so plainly. Nothing is guessed."""

from __future__ import annotations

from typing import Any, Literal

from unsloth_factory.data.thinking import split_thinking
from unsloth_factory.evaluation.judge.prompts import DIMENSIONS, HIGHEST, LOWEST
from unsloth_factory.scoring.json_answers import extract_json

Side = Literal["A", "B", "tie"]
SIDES: dict[str, Side] = {"a": "A", "b": "B", "tie": "tie", "answer a": "A", "answer b": "B"}


def read_scores(reply: str) -> dict[str, int] | None:
    """Dimension -> 1 to 5; all six must be there, as whole numbers (4, 4.0 or "4")."""
    found = _object(reply)
    scores = {name: score for name in DIMENSIONS if (score := _score(found.get(name))) is not None}
    return scores if len(scores) == len(DIMENSIONS) else None


def read_winner(reply: str) -> Side | None:
    """Which answer is better, by the name under which it was shown."""
    winner = _object(reply).get("winner")
    return SIDES.get(winner.strip().lower()) if isinstance(winner, str) else None


def read_reason(reply: str) -> str:
    """The judge's sentence; "" without one."""
    reason = _object(reply).get("reason")
    return reason.strip() if isinstance(reason, str) else ""


def _object(reply: str) -> dict[str, Any]:
    """The JSON object of the reply's answer, names in lower case; {} without one."""
    _, answer = split_thinking(reply)
    found = extract_json(answer)
    return {name.strip().lower(): value for name, value in found.value.items()} if found else {}


def _score(value: Any) -> int | None:
    """4, 4.0 or "4"; None for all that is no whole number of the scale."""
    if isinstance(value, str):
        return next((score for score in range(LOWEST, HIGHEST + 1) if value.strip() == str(score)), None)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return next((score for score in range(LOWEST, HIGHEST + 1) if value == score), None)
    return None
