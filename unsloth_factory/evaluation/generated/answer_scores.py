"""How a generated answer is scored against its reference: by number, text, shared words, or what it contains."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from unsloth_factory.evaluation.generated.numbers import final_number
from unsloth_factory.scoring import exact_match
from unsloth_factory.scoring.text import text_tokens, token_f1

Scorer = Literal["number", "exact", "contains", "f1"]
SCORERS: tuple[Scorer, ...] = ("number", "exact", "contains", "f1")
"""The number that the answer ends in; the whole answer; the reference somewhere in it; shared words (0 to 1)."""
ACCURACY, F1 = "accuracy", "token F1"


def headline(scorer: Scorer) -> str:
    """Name of the metric that a scorer gives."""
    return F1 if scorer == "f1" else ACCURACY


def contains(answer: str, reference: str) -> bool:
    """Whether the reference's words, or Chinese characters, stand in the answer one behind the other."""
    given, wanted = text_tokens(answer), text_tokens(reference)
    places = range(len(given) - len(wanted) + 1)
    return bool(wanted) and any(given[place : place + len(wanted)] == wanted for place in places)


def score_answer(scorer: Scorer, answer: str, references: Sequence[str], number: Fraction | None) -> dict[str, Any]:
    """What a record says of one answer: "correct", or for token F1 "score"; the best of several references counts."""
    if scorer == "number":
        given = final_number(answer)
        return {"number": None if given is None else str(given), "correct": given is not None and given == number}
    values: dict[str, Any] = {
        "exact": any(exact_match(answer, reference) for reference in references),
        "contains": any(contains(answer, reference) for reference in references),
        F1: max(token_f1(answer, reference) for reference in references),
    }
    return {**values, **({"score": values[F1]} if scorer == "f1" else {"correct": values[scorer]})}


def value_of(record: dict[str, Any]) -> float:
    """The score of one answer, 0 to 1."""
    return float(record["score"] if "score" in record else record["correct"])


def likely_scorer(references: Sequence[Sequence[str]]) -> Scorer:
    """Numbers where every reference is nothing but one; else shared words."""
    return "number" if all(len(given) == 1 and _is_number(given[0]) for given in references) else "f1"


def _is_number(text: str) -> bool:
    try:
        Fraction(text.replace(",", "").strip().lstrip("$¥€£"))
    except (ValueError, ZeroDivisionError):
        return False
    return True
