"""Which model to build on: the score on one's own questions against size, memory and speed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from unsloth_factory.evaluation.compare.outcome import paired
from unsloth_factory.evaluation.pages import ASSETS, markdown_table
from unsloth_factory.evaluation.report import Comparison, Metric

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One model as it was measured; `failed` says why it could not be."""

    name: str
    parameters: int = 0
    disk_bytes: int = 0
    """Its weight files."""
    memory_bytes: int = 0
    """Peak while it answered: of the card, or of the whole process where there is none."""
    load_seconds: float = 0.0
    seconds: float = 0.0
    """For all questions, without loading; 0 where answers of an earlier run were taken."""
    n: int = 0
    score: Metric | None = None
    values: dict[str, float] = field(default_factory=dict, repr=False)
    """question -> 0 to 1."""
    failed: str = ""

    @property
    def per_second(self) -> float:
        """Questions a second."""
        return self.n / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Selection:
    """All candidates, the best first, and each one's difference to the best on the same questions."""

    task: str
    metric: str
    candidates: list[Candidate]
    to_best: dict[str, Comparison]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, without the single questions."""
        rows = []
        for candidate in self.candidates:
            row = asdict(candidate) | {"questions_per_second": candidate.per_second}
            del row["values"]
            compared = self.to_best.get(candidate.name)
            rows.append(row | {"to_best": asdict(compared) if compared else None})
        return {"task": self.task, "metric": self.metric, "models": rows, "notes": list(self.notes)}


def select(task: str, metric: str, candidates: Sequence[Candidate]) -> Selection:
    """Order by score, and compare each with the best by McNemar's exact test on the same questions."""
    scored = [candidate for candidate in candidates if candidate.score is not None]
    ordered = sorted(scored, key=lambda candidate: (-_value(candidate), candidate.parameters))
    to_best = {}
    for candidate in ordered[1:]:
        compared = paired(ordered[0].values, candidate.values)
        if compared:
            to_best[candidate.name] = compared
    failed = [candidate for candidate in candidates if candidate.score is None]
    return Selection(task, metric, [*ordered, *failed], to_best, tuple(_notes(ordered, failed, to_best)))


def _value(candidate: Candidate) -> float:
    return candidate.score.value if candidate.score else -1.0


def _notes(ordered: Sequence[Candidate], failed: Sequence[Candidate], to_best: dict[str, Comparison]) -> Iterator[str]:
    for candidate in failed:
        yield f"{candidate.name} failed: {candidate.failed}"
    if not ordered:
        return
    alike = [c for c in ordered[1:] if c.name in to_best and to_best[c.name].verdict != "worse"]
    smaller = [candidate for candidate in alike if candidate.parameters < ordered[0].parameters]
    if alike:
        yield f"Not told apart from the best by {ordered[0].n} questions: {', '.join(c.name for c in alike)}."
    if smaller:
        least = min(smaller, key=lambda candidate: candidate.parameters)
        yield f"The smallest of these is {least.name} ({size(least)})."
    if len(to_best) > 1:
        yield "The best was picked by the same questions and the p-values are of single pairs: small ones mislead."


def size(candidate: Candidate) -> str:
    """Parameters as one says them."""
    count = candidate.parameters
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


HEAD = ("model", "score", "to the best", "p", "size", "memory GB", "questions/s", "disk GB", "load s")
SHOWN = 7
"""Columns that a terminal has room for."""


def rows(selection: Selection) -> list[list[str]]:
    """The table, as text."""
    found = []
    for candidate in selection.candidates:
        if candidate.score is None:
            found.append([candidate.name, "failed", *[""] * (len(HEAD) - 2)])
            continue
        compared = selection.to_best.get(candidate.name)
        found.append(
            [
                candidate.name,
                f"{candidate.score.value:.3f}±{candidate.score.standard_error:.3f}",
                f"{compared.delta:+.3f}" + (" worse" if compared.verdict == "worse" else "") if compared else "best",
                "" if compared is None or compared.p_value is None else f"{compared.p_value:.3g}",
                size(candidate),
                f"{candidate.memory_bytes / GB:.2f}",
                f"{candidate.per_second:.3g}" if candidate.seconds else "-",
                f"{candidate.disk_bytes / GB:.2f}",
                f"{candidate.load_seconds:.1f}",
            ]
        )
    return found


def markdown(selection: Selection) -> str:
    """The table and the notes in Markdown."""
    lines = [f"# Models on {selection.task}: {selection.metric}\n", *markdown_table(HEAD, rows(selection)), ""]
    return "\n".join([*lines, *(f"{note}\n" for note in selection.notes)]) + "\n"


def html(selection: Selection) -> str:
    """The table and a plot of score against size, with nothing to fetch from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("models.html.jinja")
    return template.render(selection=selection, head=HEAD, rows=rows(selection), points=list(_points(selection)))


def _points(selection: Selection) -> Iterator[dict[str, Any]]:
    """Where each model stands in the plot, 0 to 100: to the right by the logarithm of its size, upwards by score."""
    scored = [candidate for candidate in selection.candidates if candidate.score and candidate.parameters]
    sizes = [math.log(candidate.parameters) for candidate in scored]
    low, high = min(sizes, default=0.0), max(sizes, default=0.0)
    for candidate, place in zip(scored, sizes, strict=True):
        assert candidate.score
        yield {
            "name": candidate.name,
            "x": round(10 + 80 * (place - low) / (high - low), 2) if high > low else 50,
            "y": round(100 * candidate.score.value, 2),
            "error": round(100 * candidate.score.standard_error, 2),
        }
