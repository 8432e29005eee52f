"""The files of one finished benchmark, read back: its report, and one value a question to pair models by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.evaluation.averages import compare, mean_metric, normal_p
from unsloth_factory.evaluation.report import Comparison, Metric
from unsloth_factory.scoring import mcnemar


@dataclass(frozen=True)
class Outcome:
    """A benchmark as it ended. `values`: variant -> question -> 0 to 1."""

    task: str
    n: int
    headline: str
    metrics: dict[str, dict[str, Metric]]
    comparisons: dict[str, Comparison]
    values: dict[str, dict[str, float]]
    notes: tuple[str, ...] = ()

    def score(self, variant: str) -> Metric:
        """The metric to quote."""
        return self.metrics[variant][self.headline]


def read_outcome(folder: Path, name: str) -> Outcome:
    """Read NAME.json and NAME_samples.jsonl."""
    report = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    lines = (folder / f"{name}_samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    headline = report["headline"]
    return Outcome(
        task=report["task"],
        n=report["n"],
        headline=headline,
        metrics={
            variant: {key: Metric(**value) for key, value in metrics.items()}
            for variant, metrics in report["metrics"].items()
        },
        comparisons={
            key: Comparison(**{**value, "interval": tuple(value["interval"])})
            for key, value in report["comparisons"].items()
        },
        values={variant: _values(records, variant, headline) for variant in report["metrics"]},
        notes=tuple(report["notes"]),
    )


def _values(records: Sequence[Mapping[str, Any]], variant: str, headline: str) -> dict[str, float]:
    found = {}
    metric = headline.split(" (")[0].rpartition(" ")[2]  # of a task of lm-evaluation-harness
    for record in records:
        given = record.get(variant, {})
        value = next((given[key] for key in ("score", "correct", metric) if key in given), None)
        if isinstance(value, bool | int | float):
            place = [record.get(key) for key in ("task", "filter", "subject", "source", "id")]
            found[json.dumps(place)] = float(value)
    return found


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> Comparison | None:
    """After against before on the questions that both answered: McNemar's exact test of right and wrong.

    Other values than 0 and 1 are compared by the normal approximation. None without common questions.
    """
    common = [question for question in before if question in after]
    if not common:
        return None
    change = np.array([after[question] - before[question] for question in common])
    difference = mean_metric(change)
    if set(np.unique(change)) <= {-1.0, 0.0, 1.0}:
        p_value = mcnemar(int((change < 0).sum()), int((change > 0).sum()))
    else:
        p_value = normal_p(difference.value, difference.standard_error)
    first, second = (float(np.mean([side[question] for question in common])) for side in (before, after))
    return compare(first, second, difference.standard_error, p_value)
