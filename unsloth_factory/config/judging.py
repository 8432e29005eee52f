"""Settings of what comes after the answers: a judge, people who review, and models behind an address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsloth_factory.config.errors import require


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """A model that judges the answers of the validation (those that are there already are not generated again)."""

    judge: str | None = None
    """Address of an OpenAI-compatible server (http://HOST:PORT/v1), or a model to load here: a folder, tiny, a hub id.
    Its key, if it needs one, is in the environment variable of --judge_key_env."""
    judge_model: str | None = None
    """Name of the server's model. Default: its only one."""
    judge_mode: Literal["both", "pointwise", "pairwise"] = "both"
    """Scores from 1 to 5 for each answer, which of two answers is better (both orders), or both."""
    judge_against: str | None = None
    """Further runs (or folders of validations) to compare with, by commas: their tuned answers to the same questions.
    Three models and more get ratings."""
    judge_price: str | None = None
    """What the judge costs for a million tokens in and out, such as 0.15,0.60; then the estimate has a sum."""
    judge_max_requests: int = 1000
    """Most requests to the judge; more are refused before any is sent. Replies of earlier runs are kept and free."""
    judge_concurrency: int = 4
    """Requests under way at a time; of a loaded model, prompts a batch."""
    judge_max_new_tokens: int = 512
    """Longest reply of the judge, tokens; give more to a judge that thinks first."""
    judge_key_env: str = "UF_API_KEY"
    """Environment variable that holds the key of the judge's server."""

    def __post_init__(self) -> None:
        for flag in ("judge_max_requests", "judge_concurrency", "judge_max_new_tokens"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "at least 1")
        require(self.prices is not None, "judge_price", self.judge_price, "two numbers by a comma: in,out")
        # The value is not repeated: it may be a key, given where its variable's name belongs.
        require(self.judge_key_env.isidentifier(), "judge_key_env", "", "the name of an environment variable")

    @property
    def prices(self) -> tuple[float, float] | None:
        """For a token in and out, 0 where nothing is known; None where they cannot be read."""
        if self.judge_price is None:
            return 0.0, 0.0
        try:
            read, written = (float(part) / 1e6 for part in self.judge_price.split(","))
        except ValueError:
            return None
        return (read, written) if min(read, written) >= 0 else None


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """A model under test that a server holds; nothing is loaded here."""

    endpoint: str | None = None
    """Address of an OpenAI-compatible server (http://HOST:PORT/v1) whose model answers; a --run only tells how."""
    endpoint_model: str | None = None
    """Name of the server's model. Default: its only one."""
    endpoint_concurrency: int = 4
    """Requests under way at a time."""
    endpoint_key_env: str = "UF_API_KEY"
    """Environment variable that holds the key of the server."""

    def __post_init__(self) -> None:
        require(self.endpoint_concurrency >= 1, "endpoint_concurrency", self.endpoint_concurrency, "at least 1")
        require(self.endpoint_key_env.isidentifier(), "endpoint_key_env", "", "the name of an environment variable")


@dataclass(frozen=True, kw_only=True)
class ReviewSettings:
    """People who judge the answers of the validation, without knowing which is whose."""

    review: bool = False
    """Write review.html, a sheet for blind rating in any browser, and review_key.json, which un-blinds it."""
    review_seed: int | None = None
    """Order of the questions and answers. Default: by chance, and kept for the same answers."""
    ratings: str | None = None
    """Read ratings that a sheet saved back: a file, or several by commas."""
