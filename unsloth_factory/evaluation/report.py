"""The result of a validation or a benchmark: plain values, ready for JSON."""

from __future__ import annotations

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
