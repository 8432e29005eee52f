"""What quantising costs, with standard errors, and the smallest file whose cost is within a limit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unsloth_factory.config.settings import GateMeasure
from unsloth_factory.evaluation.quality.token_scores import TokenScores
from unsloth_factory.scoring.bootstrap import NORMAL, OfSums, jackknife_error, ratio

MEASURES: dict[GateMeasure, str] = {
    "kl": "mean KL divergence",
    "perplexity": "rise of perplexity",
    "accuracy": "drop of next-token accuracy",
}
TWO_SIDED_95 = NORMAL.inv_cdf(0.975)
RESAMPLES, SEED = 200, 3407


@dataclass(frozen=True)
class Value:
    """A number with its standard error; None where it has none (a maximum)."""

    value: float
    error: float | None = None

    @property
    def upper(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + TWO_SIDED_95 * (self.error or 0.0)


@dataclass(frozen=True)
class FileQuality:
    """One file, measured against the 16-bit one."""

    name: str
    """Its type."""
    path: str
    sha256: str
    bytes: int
    values: dict[str, Value]
    """See `quality_values`."""
    losses: dict[str, Value]
    """What each gate measure reads; empty for the 16-bit file."""
    passed: bool | None = None
    """None without a gate, and for the 16-bit file."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def quality_values(reference: TokenScores, scores: TokenScores) -> tuple[dict[str, Value], dict[str, Value]]:
    """(all statistics, those that a gate can judge) of one file against the 16-bit one.

    Perplexity is exp of the mean loss a token; its ratio exp of the mean difference. Standard errors by leaving out one
    answer at a time (jackknife); that of the 99th percentile by drawing answers with replacement (bootstrap).
    """
    rise = scores.loss - reference.loss
    values = {
        "perplexity": _of_mean(scores, scores.loss, _exp_ratio),
        "perplexity ratio": _of_mean(scores, rise, _exp_ratio),
        "mean KL": _of_mean(scores, scores.divergence, ratio),
        "median KL": _quantile(scores, 0.5),
        "99 % KL": _quantile(scores, 0.99),
        "max KL": Value(float(scores.divergence.max())),
        "same top token": _of_mean(scores, scores.same_top, ratio),
        "right tokens": _of_mean(scores, scores.right, ratio),
        "RMS probability change": _of_mean(scores, (np.exp(-scores.loss) - np.exp(-reference.loss)) ** 2, _root_ratio),
    }
    risen = values["perplexity ratio"]
    losses: dict[str, Value] = {
        "kl": values["mean KL"],
        "perplexity": Value(risen.value - 1.0, risen.error),
        "accuracy": _of_mean(scores, reference.right.astype(float) - scores.right, ratio),
    }
    return values, losses


def _exp_ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(np.exp(np.minimum(ratio(sums), 700.0)))


def _root_ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(np.sqrt(ratio(sums)))


def _of_mean(scores: TokenScores, tokens: np.ndarray, of_sums: OfSums) -> Value:
    """A function of the mean over all tokens; `tokens` [n]."""
    count = int(scores.answer.max()) + 1
    sums = np.bincount(scores.answer, weights=tokens.astype(float), minlength=count)
    features = np.stack([sums, np.bincount(scores.answer, minlength=count).astype(float)], axis=1)
    return Value(float(of_sums(features.sum(0))), jackknife_error(features, of_sums))


def _quantile(scores: TokenScores, share: float) -> Value:
    drawn = []
    random = np.random.default_rng(SEED)
    answers = [scores.divergence[scores.answer == at] for at in range(int(scores.answer.max()) + 1)]
    for _ in range(RESAMPLES):
        picked = random.integers(0, len(answers), len(answers))
        drawn.append(np.quantile(np.concatenate([answers[at] for at in picked]), share))
    return Value(float(np.quantile(scores.divergence, share)), float(np.std(drawn, ddof=1)))


def judge(files: Sequence[FileQuality], measure: GateMeasure, limit: float) -> list[FileQuality]:
    """The files with `passed` filled in: the upper end of the loss's 95 % interval is at most the limit.

    So a file passes only where the held-out answers are enough to say so; a few answers make the gate stricter.
    """
    judged = []
    for file in files:
        passed = None
        if file.losses:
            upper = file.losses[measure].upper
            passed = math.isfinite(upper) and upper <= limit
        judged.append(FileQuality(**{**vars(file), "passed": passed}))
    return judged


def pick(files: Sequence[FileQuality]) -> FileQuality | None:
    """The smallest file that passed."""
    return min((file for file in files if file.passed), key=lambda file: file.bytes, default=None)
