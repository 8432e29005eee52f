"""What a training has cost elsewhere: base against tuned over several benchmarks, significant losses first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unsloth_factory.evaluation.compare.outcome import Outcome
from unsloth_factory.evaluation.pages import markdown_table

HEAD = ("task", "metric", "n", "base", "tuned", "difference", "95 % interval", "p", "")
LOSS, GAIN = "LOSS", "gain"


@dataclass(frozen=True)
class Forgetting:
    """The outcomes, significant losses first."""

    outcomes: list[Outcome]

    @property
    def losses(self) -> list[str]:
        """Tasks that the tuned model is significantly worse at."""
        return [outcome.task for outcome in self.outcomes if _flag(outcome) == LOSS]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, without the single questions."""
        rows = []
        for outcome in self.outcomes:
            compared = outcome.comparisons.get(outcome.headline)
            scores = {variant: asdict(outcome.score(variant)) for variant in outcome.metrics}
            row = {"task": outcome.task, "metric": outcome.headline, "n": outcome.n, "scores": scores}
            rows.append(row | {"comparison": asdict(compared) if compared else None, "flag": _flag(outcome)})
        return {"tasks": rows, "losses": self.losses}


def collect(outcomes: Sequence[Outcome]) -> Forgetting:
    """Put significant losses first, then the greatest differences downwards."""

    def order(outcome: Outcome) -> tuple[bool, float]:
        compared = outcome.comparisons.get(outcome.headline)
        return _flag(outcome) != LOSS, compared.delta if compared else 0.0

    return Forgetting(sorted(outcomes, key=order))


def _flag(outcome: Outcome) -> str:
    compared = outcome.comparisons.get(outcome.headline)
    return {"worse": LOSS, "better": GAIN}.get(compared.verdict, "") if compared else ""


def rows(forgetting: Forgetting) -> list[list[str]]:
    """The table, as text; without a tuned model the differences are empty."""
    found = []
    for outcome in forgetting.outcomes:
        compared = outcome.comparisons.get(outcome.headline)
        row = [outcome.task, outcome.headline, str(outcome.n)]
        for variant in ("base", "tuned"):
            metric = outcome.score(variant) if variant in outcome.metrics else None
            row.append(f"{metric.value:.3f}±{metric.standard_error:.3f}" if metric else "-")
        if compared:
            low, high = compared.interval
            p_value = "" if compared.p_value is None else f"{compared.p_value:.3g}"
            row += [f"{compared.delta:+.3f}", f"[{low:+.3f}, {high:+.3f}]", p_value, _flag(outcome)]
        found.append(row + [""] * (len(HEAD) - len(row)))
    return found


def conclusion(forgetting: Forgetting) -> str:
    """The table in words."""
    compared = [outcome for outcome in forgetting.outcomes if outcome.headline in outcome.comparisons]
    if not compared:
        return "One model alone: nothing is compared. --run FOLDER compares base and tuned."
    if not forgetting.losses:
        return f"No significant loss on {len(compared)} tasks; a loss smaller than the intervals' width would not show."
    return f"Significant loss on {len(forgetting.losses)} of {len(compared)} tasks: {', '.join(forgetting.losses)}."


def markdown(forgetting: Forgetting) -> str:
    """The table and its conclusion in Markdown."""
    return "\n".join(["# Base and tuned over tasks\n", *markdown_table(HEAD, rows(forgetting))]) + (
        f"\n\n{conclusion(forgetting)}\n"
    )
