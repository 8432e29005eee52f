"""Judge the answers of a validation: scores for each, every pair in both orders, and what follows from it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from unsloth_factory.evaluation.judge.asking import Answers, Estimate, Judge, Request, ask_judge
from unsloth_factory.evaluation.judge.cache import ReplyCache
from unsloth_factory.evaluation.judge.prompts import DIMENSIONS, SCALE, Case, pairwise_messages, pointwise_messages
from unsloth_factory.evaluation.judge.verdicts import Side, read_reason, read_scores, read_winner
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.evaluation.validation.measures import Measure, comparisons, metrics
from unsloth_factory.inference.generate import Progress
from unsloth_factory.scoring.bootstrap import mean_features, ratio
from unsloth_factory.scoring.pairwise import elo_ratings, win_rate

Mode = Literal["both", "pointwise", "pairwise"]
OVERALL = "overall score"
TIE = "tie"


@dataclass(frozen=True)
class Verdict:
    """Two answers to one question, shown in both orders."""

    first: str
    """The variant that was A in the first order and B in the second."""
    second: str
    sides: tuple[Side | None, Side | None]
    """The winner's name in each order; None where the judge did not say."""
    same: bool = False
    """The answers are the same text: a tie without asking."""

    @property
    def winner(self) -> str | None:
        """The better variant, "tie" (also when the orders disagree), or None without two plain verdicts."""
        if self.same:
            return TIE
        if None in self.sides:
            return None
        one, other = self._variants()
        return one if one == other else TIE

    @property
    def disagree(self) -> bool:
        """The order in which the answers were shown changed the verdict."""
        if self.same or None in self.sides:
            return False
        one, other = self._variants()
        return one != other

    def _variants(self) -> tuple[str, str]:
        one = {"A": self.first, "B": self.second}.get(str(self.sides[0]), TIE)
        return one, {"A": self.second, "B": self.first}.get(str(self.sides[1]), TIE)


@dataclass(frozen=True)
class JudgeResult:
    """The report, and one record a question."""

    report: EvalReport
    records: list[dict[str, Any]]


@dataclass(frozen=True)
class _Place:
    """What one request was for."""

    case: int
    variant: str = ""
    """Pointwise."""
    pair: tuple[str, str] | None = None
    """Pairwise: (A, B) as they were shown."""


def judge_answers(
    cases: Sequence[Case],
    judge: Judge,
    cache: ReplyCache,
    *,
    mode: Mode = "both",
    max_requests: int = 1000,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_progress: Progress | None = None,
) -> JudgeResult:
    """Ask the judge about every answer and pair of answers.

    Args:
        cases: Questions with answers; all have the same variants.
        judge: Who is asked.
        cache: Kept replies.
        mode: pointwise scores, pairwise verdicts, or both.
        max_requests: Most requests.
        on_estimate: See `ask_judge`.
        on_progress: See `ask_judge`.

    Raises:
        UserError: See `ask_judge`.
    """
    variants = list(cases[0].answers)
    places, requests = _requests(cases, variants, mode)
    answers = ask_judge(
        judge, requests, cache, max_requests=max_requests, on_estimate=on_estimate, on_progress=on_progress
    )
    scores, verdicts, reasons = _taken_apart(cases, variants, places, answers, mode)
    report = EvalReport(
        task="judge",
        model={"judge": judge.name},
        settings={"mode": mode, "scale": SCALE, "variants": variants},
        n=len(cases),
        metrics={},
        notes=tuple(_notes(answers)),
        details={"pairs": _pairs(variants, verdicts), "ratings": _ratings(variants, verdicts)}
        | {"requests": {name: value for name, value in vars(answers).items() if name not in ("values", "replies")}},
    )
    if mode != "pairwise":
        measured = {variant: _measures([row.get(variant) for row in scores]) for variant in variants}
        both = {"base", "tuned"} <= measured.keys()
        found = {
            "metrics": {variant: metrics(values) for variant, values in measured.items()},
            "comparisons": comparisons(measured["base"], measured["tuned"]) if both else {},
            "headline": OVERALL,
        }
        report = EvalReport(**{**vars(report), **found})
    return JudgeResult(report, _records(cases, scores, verdicts, reasons))


def _requests(cases: Sequence[Case], variants: Sequence[str], mode: Mode) -> tuple[list[_Place], list[Request]]:
    places, requests = [], []
    for index, case in enumerate(cases):
        if mode != "pairwise":
            for variant in variants:
                places.append(_Place(index, variant))
                requests.append(Request(pointwise_messages(case, variant), read_scores))
        if mode == "pointwise":
            continue
        for one, other in combinations(variants, 2):
            if _same(case, one, other):
                continue
            for pair in ((one, other), (other, one)):
                places.append(_Place(index, pair=pair))
                requests.append(Request(pairwise_messages(case, *pair), read_winner))
    return places, requests


def _same(case: Case, one: str, other: str) -> bool:
    return case.answers[one].strip() == case.answers[other].strip()


Scores = list[dict[str, dict[str, int] | None]]
Verdicts = list[list[Verdict]]


def _taken_apart(
    cases: Sequence[Case], variants: Sequence[str], places: Sequence[_Place], answers: Answers, mode: Mode
) -> tuple[Scores, Verdicts, list[dict[str, str]]]:
    """(scores, verdicts, the judge's sentences) by question."""
    scores: Scores = [{} for _ in cases]
    sides: list[dict[tuple[str, str], Side | None]] = [{} for _ in cases]
    reasons: list[dict[str, str]] = [{} for _ in cases]
    for place, value, reply in zip(places, answers.values, answers.replies, strict=True):
        if place.pair:
            sides[place.case][place.pair] = value
        else:
            scores[place.case][place.variant] = value
        name = f"A {place.pair[0]}, B {place.pair[1]}" if place.pair else place.variant
        reasons[place.case][name] = read_reason(reply)
    pairs = list(combinations(variants, 2)) if mode != "pointwise" else []
    verdicts = [
        [
            Verdict(one, other, (known.get((one, other)), known.get((other, one))), _same(case, one, other))
            for one, other in pairs
        ]
        for case, known in zip(cases, sides, strict=True)
    ]
    return scores, verdicts, reasons


def _measures(scores: Sequence[Mapping[str, int] | None]) -> dict[str, Measure]:
    """Mean of each dimension and of all, over the answers that were scored."""
    columns = {name: [np.nan if row is None else float(row[name]) for row in scores] for name in DIMENSIONS}
    columns[OVERALL] = list(np.mean(list(columns.values()), axis=0))
    return {name: Measure(mean_features(np.array(values, dtype=float)), ratio) for name, values in columns.items()}


def _pairs(variants: Sequence[str], verdicts: Verdicts) -> list[dict[str, Any]]:
    """Each pair's wins of the second variant over the first, and how far the order of showing mattered."""
    table = []
    for number in range(len(verdicts[0]) if verdicts else 0):
        row = [of_case[number] for of_case in verdicts]
        first, second = row[0].first, row[0].second
        winners = [verdict.winner for verdict in row]
        rate = win_rate(winners.count(second), winners.count(TIE), winners.count(first))
        asked = [verdict for verdict in row if not verdict.same and None not in verdict.sides]
        sides = [side for verdict in asked for side in verdict.sides if side != TIE]
        counts = {name: value for name, value in asdict(rate).items() if name != "value"}
        table.append(
            {
                "of": second,
                "against": first,
                "n": rate.n,
                "win_rate": rate.value,
                **counts,
                "verdict": rate.verdict,
                "same_text": sum(verdict.same for verdict in row),
                "without_verdict": winners.count(None),
                "orders_disagree": sum(verdict.disagree for verdict in asked) / len(asked) if asked else None,
                "first_shown_preferred": sides.count("A") / len(sides) if sides else None,
            }
        )
    return table


def _ratings(variants: Sequence[str], verdicts: Verdicts) -> dict[str, dict[str, Any]]:
    """Elo ratings of three variants and more."""
    if len(variants) < 3 or not verdicts or not verdicts[0]:
        return {}
    places = {variant: place for place, variant in enumerate(variants)}
    points = np.zeros((len(verdicts), len(variants), len(variants)))
    for row, of_case in enumerate(verdicts):
        for verdict in of_case:
            if verdict.winner is None:
                continue
            one, other = places[verdict.first], places[verdict.second]
            points[row, one, other] = {verdict.first: 1.0, TIE: 0.5}.get(verdict.winner, 0.0)
            points[row, other, one] = 1.0 - points[row, one, other]
    return {variant: asdict(rating) for variant, rating in zip(variants, elo_ratings(points), strict=True)}


def _notes(answers: Answers) -> list[str]:
    notes = []
    if answers.unreadable:
        cut = f" {answers.cut_off} were cut off: raise --judge_max_new_tokens." if answers.cut_off else ""
        notes.append(f"{answers.unreadable} of the judge's replies could not be read, also when asked for again.{cut}")
    if answers.failed:
        notes.append(f"{answers.failed} requests failed; the first one: {answers.first_failure}")
    return notes


def _records(
    cases: Sequence[Case], scores: Scores, verdicts: Verdicts, reasons: Sequence[Mapping[str, str]]
) -> list[dict[str, Any]]:
    return [
        {
            "source": case.source,
            "question": case.question,
            "scores": scored,
            "pairs": [{**asdict(v), "winner": v.winner, "orders_disagree": v.disagree} for v in given],
            "reasons": dict(said),
        }
        for case, scored, given, said in zip(cases, scores, verdicts, reasons, strict=True)
    ]
