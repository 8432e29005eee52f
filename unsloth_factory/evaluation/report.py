"""The result of a validation or a benchmark: plain values, JSON and printed tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Direction = Literal["higher", "lower", "neutral"]
Verdict = Literal["better", "worse", "no difference beyond the error", ""]


@dataclass(frozen=True)
class Metric:
    """A mean with its standard error over `n` answers. `better` says which direction is good."""

    value: float
    standard_error: float
    n: int
    better: Direction = "higher"


@dataclass(frozen=True)
class Comparison:
    """Tuned against base on the same questions. `interval` is the 95 % confidence interval of the difference."""

    base: float
    tuned: float
    delta: float
    interval: tuple[float, float]
    p_value: float | None
    verdict: Verdict


@dataclass(frozen=True)
class EvalReport:
    """What `validate` and `evaluate` return; `to_dict` is what they write."""

    task: str
    model: dict[str, Any]
    """Path, fingerprint, adapter, engine, dtype, thinking mode."""
    settings: dict[str, Any]
    n: int
    """Questions that were answered."""
    metrics: dict[str, dict[str, Metric]]
    """variant ("base", "tuned") -> metric -> value."""
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    """metric -> tuned against base; empty without both."""
    headline: str = ""
    """The metric to quote."""
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    """What one kind of report has beyond this: subjects, groups, worst samples."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def report_table(report: EvalReport) -> Any:
    """A rich table: one row a metric, base, tuned, difference and verdict."""
    from rich.table import Table

    variants = list(report.metrics)
    table = Table(title=f"{report.task}: {report.n} questions")
    table.add_column("metric")
    for variant in variants:
        table.add_column(variant, justify="right")
    if report.comparisons:
        table.add_column("difference [95 %]", justify="right")
        table.add_column("verdict")
    for row in _rows(report, variants):
        table.add_row(*row)
    return table


def _rows(report: EvalReport, variants: list[str]) -> Iterator[list[str]]:
    for name in report.metrics[variants[0]]:
        row = [f"{name} *" if name == report.headline else name]
        row += [_number(report.metrics[variant][name]) for variant in variants]
        if report.comparisons:
            comparison = report.comparisons.get(name)
            row += [_difference(comparison), comparison.verdict] if comparison else ["", ""]
        yield row


def _number(metric: Metric) -> str:
    return f"{metric.value:.4f} ± {metric.standard_error:.4f}" if metric.n else "-"


def _difference(comparison: Comparison) -> str:
    low, high = comparison.interval
    return f"{comparison.delta:+.4f} [{low:+.4f}, {high:+.4f}]"
