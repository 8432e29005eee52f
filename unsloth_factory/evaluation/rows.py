"""The delta table of a validation, ready to print: regressions first, then all else in the order of the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from unsloth_factory.evaluation.report import Comparison, EvalReport, Metric

PER_ANSWER = " per answer"


@dataclass(frozen=True)
class Row:
    """One metric, its numbers as text."""

    name: str
    values: tuple[str, ...]
    """One a variant; "-" where there is none."""
    errors: tuple[str, ...]
    """Their standard errors, "" where there is none."""
    count: int
    """Answers that it says something about."""
    delta: str = ""
    interval: str = ""
    verdict: str = ""
    """"better", "worse", "within error", or "" where there is nothing to judge."""
    headline: bool = False
    bounds: tuple[float, float] | None = None
    """The interval, as shares of its larger end (-1 to 1), for drawing."""


def table_rows(report: EvalReport) -> list[Row]:
    """The rows of a report; metrics that say nothing are left out, and faults that no answer has (`silent_faults`)."""
    silent = set(silent_faults(report))
    rows = [row for name in _names(report) if name not in silent for row in _row(report, name)]
    return sorted(rows, key=lambda row: row.verdict != "worse")


def silent_faults(report: EvalReport) -> list[str]:
    """What was looked for and found in no answer: one line says so for all of it."""
    found = []
    for name in _names(report):
        values = [given[name] for given in report.metrics.values() if name in given and given[name].n]
        if values and all(value.better == "lower" and value.value == 0 for value in values):
            found.append(name)
    return found


def plain_name(name: str) -> str:
    """A metric's name as a table has room for it."""
    return name.removesuffix(PER_ANSWER)


def _names(report: EvalReport) -> list[str]:
    return list(dict.fromkeys(name for metrics in report.metrics.values() for name in metrics))


def _row(report: EvalReport, name: str) -> Iterator[Row]:
    given = [metrics.get(name) for metrics in report.metrics.values()]
    count = max((metric.n for metric in given if metric), default=0)
    if not count:
        return
    row = Row(
        name=plain_name(name),
        values=tuple(number(metric.value) if metric and metric.n else "-" for metric in given),
        errors=tuple(_error(metric) for metric in given),
        count=count,
        headline=name == report.headline,
    )
    compared = report.comparisons.get(name)
    yield Row(**{**vars(row), **_difference(compared)}) if compared else row


def _difference(compared: Comparison) -> dict[str, object]:
    digits = min(_digits(compared.base), _digits(compared.tuned))
    low, high = compared.interval
    largest = max(abs(low), abs(high))
    verdict = "within error" if compared.verdict.startswith("no difference") else compared.verdict
    return {
        "delta": f"{compared.delta:+.{digits}f}",
        "interval": f"[{low:+.{digits}f}, {high:+.{digits}f}]",
        "verdict": verdict,
        "bounds": (low / largest, high / largest) if largest else None,
    }


def number(value: float) -> str:
    """A value with as many digits as matter."""
    return f"{value:.{_digits(value)}f}"


def _error(metric: Metric | None) -> str:
    return f"{metric.standard_error:.{_digits(metric.value)}f}" if metric and metric.n else ""


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 1
