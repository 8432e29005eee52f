"""How alike two models answer the same questions: equal choices, and how far their log-probabilities are apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unsloth_factory.evaluation.report import EvalReport


@dataclass(frozen=True)
class Agreement:
    """Of `n` questions."""

    n: int
    same_choice: int
    """Questions with equal choices."""
    mean_difference: float
    """Mean absolute difference of the choices' log-probabilities, nats."""
    largest_difference: float


def agreement(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Agreement:
    """Compare records of two models (`record[variant]` of `choice.evaluate`), both in the order of the questions.

    Raises:
        ValueError: They are not of the same number of questions, or of none.
    """
    pairs = list(zip(one, other, strict=True))
    if not pairs:
        raise ValueError("agreement: no questions")
    apart = np.abs([[a["logprobs"][letter] - b["logprobs"][letter] for letter in a["logprobs"]] for a, b in pairs])
    return Agreement(
        n=len(pairs),
        same_choice=sum(a["choice"] == b["choice"] for a, b in pairs),
        mean_difference=float(apart.mean()),
        largest_difference=float(apart.max()),
    )


def agreement_lines(report: EvalReport) -> Iterator[str]:
    """`details["agreement"]` in words: variant -> Agreement as a dict, and `with`, the variant compared with."""
    for variant, found in report.details.get("agreement", {}).items():
        yield (
            f"{variant} chooses as {found['with']} in {found['same_choice']:,} of {found['n']:,} questions "
            f"({found['same_choice'] / found['n']:.2%}); log-probabilities {found['mean_difference']:.4f} nats apart "
            f"on average, {found['largest_difference']:.4f} at most"
        )
