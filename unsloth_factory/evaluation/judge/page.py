"""A judgement as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from unsloth_factory.evaluation.judge.judging import JudgeResult
from unsloth_factory.evaluation.judge.prompts import DIMENSIONS, Case
from unsloth_factory.evaluation.pages import ASSETS
from unsloth_factory.evaluation.rows import table_rows

EXAMPLES = 5


def judge_page(result: JudgeResult, cases: Sequence[Case]) -> str:
    """Win rates, ratings, scores, and the answers that lost."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    report = result.report
    loser = _of_interest(report.settings["variants"]) if report.details["pairs"] else None
    return environment.get_template("judge.html.jinja").render(
        report=report,
        variants=list(report.metrics),
        rows=table_rows(report),
        pairs=report.details["pairs"],
        ratings=list(_bars(report.details["ratings"])),
        loser=loser,
        examples=list(_examples(result, cases, loser)),
    )


def _of_interest(variants: Sequence[str]) -> str:
    return "tuned" if "tuned" in variants else variants[-1]


def _bars(ratings: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The ratings, best first, with their places on a scale from 0 to 100."""
    ends = [end for rating in ratings.values() for end in rating["interval"]]
    for name, rating in sorted(ratings.items(), key=lambda item: -item[1]["value"]):
        places = [
            2 + 96 * (value - min(ends)) / max(1e-9, max(ends) - min(ends))
            for value in (*rating["interval"], rating["value"])
        ]
        yield {"name": name, **rating, "low": places[0], "high": places[1], "at": places[2]}


def _examples(result: JudgeResult, cases: Sequence[Case], loser: str | None) -> Iterator[dict[str, Any]]:
    """Questions that `loser` lost, those with the lowest scores first; without pairs simply the lowest scores."""
    found: list[tuple[int, float, int, Case, dict[str, Any]]] = []
    for case, record in zip(cases, result.records, strict=True):
        lost = [
            pair for pair in record["pairs"] if loser in (pair["first"], pair["second"]) and _lost(pair, str(loser))
        ]
        scores = record["scores"].get(loser or next(iter(case.answers)))
        mean = sum(scores.values()) / len(DIMENSIONS) if scores else None
        if (loser and lost) or (not loser and mean is not None and mean < 5):
            found.append((-len(lost), 5.0 if mean is None else mean, len(found), case, record))
    for _, _, _, case, record in sorted(found, key=lambda entry: entry[:3])[:EXAMPLES]:
        texts = {"reference": case.reference} if case.reference else {}
        yield {
            "source": case.source,
            "question": case.question,
            "texts": texts | dict(case.answers),
            "reasons": record["reasons"],
        }


def _lost(pair: Mapping[str, Any], loser: str) -> bool:
    return pair["winner"] not in (None, "tie", loser)
