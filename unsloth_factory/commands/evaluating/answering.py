"""Greedy answers of a loaded model to benchmark questions, kept on disk; base and tuned from one load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.evaluating.identity import model_identity
from unsloth_factory.commands.source import ResolvedModel
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.generated.generative import Answerer
from unsloth_factory.evaluation.generated.kept_answers import KeptAnswers
from unsloth_factory.inference.generate import AT_ONCE, Generation, Progress, generate
from unsloth_factory.inference.thinking import ThinkingBudget
from unsloth_factory.inference.workers import MOST_WORKERS
from unsloth_factory.model.loaded import LoadedModel


class ModelAnswers:
    """Answers the prompts of a benchmark as each variant of one model.

    Args:
        resolved: Where the model comes from.
        loaded: The model.
        template: Its chat template.
        thinking: The mode that the prompts are rendered with.
        longest: Longest answer, tokens; with a thinking budget what follows the thinking.
        config: Batch size and thinking budget.
        folder: Where answers are kept.
    """

    def __init__(
        self,
        resolved: ResolvedModel,
        loaded: LoadedModel,
        template: ChatTemplate,
        *,
        thinking: bool | None,
        longest: int,
        config: EvaluateConfig,
        folder: Path,
    ) -> None:
        self._loaded, self._template = loaded, template
        self._longest, self._batch_size = longest, config.batch_size or AT_ONCE
        self._budget = ThinkingBudget(config.thinking_budget, template, thinking) if config.thinking_budget else None
        settings: dict[str, Any] = {"max_new_tokens": longest, "thinking_budget": config.thinking_budget}
        settings |= {"thinking": thinking, "stop_ids": sorted(template.stop_ids)}
        # what is generated, and so may be lost, together: a CPU works on several batches at a time
        chunk = self._batch_size * (MOST_WORKERS if loaded.device.type == "cpu" else 1)
        self.kept: dict[str, KeptAnswers] = {
            variant: KeptAnswers(folder, model_identity(variant, resolved, loaded), settings, chunk=chunk)
            for variant in resolved.variants
        }

    @property
    def room(self) -> int:
        """Tokens that the longest answer takes."""
        return self._longest + (self._budget.tokens + len(self._budget.closing_ids) if self._budget else 0)

    def answerers(self, on_progress: Progress | None = None) -> dict[str, Answerer]:
        """Answers to prompts, by variant."""
        return {variant: self._answerer(variant, on_progress) for variant in self.kept}

    def _answerer(self, variant: str, on_progress: Progress | None) -> Answerer:
        def answer(prompts: Sequence[list[int]]) -> list[Generation]:
            if variant == "base":
                with self._loaded.adapter_disabled():
                    return self._generate(prompts)
            return self._generate(prompts)

        return lambda prompts: self.kept[variant].complete(answer, prompts, on_progress)

    def _generate(self, prompts: Sequence[list[int]]) -> list[Generation]:
        return generate(
            self._loaded,
            prompts,
            stop_ids=self._template.stop_ids,
            max_new_tokens=self._longest,
            batch_size=self._batch_size,
            thinking=self._budget,
        )

    def print_found(self, console: Console) -> None:
        """Say what an earlier run had answered."""
        found = sum(kept.found for kept in self.kept.values())
        if found:
            folder = next(iter(self.kept.values())).path.parent
            line = f"{found} answers by the same model to the same prompts were there: {folder}"
            console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def check_limits(config: EvaluateConfig, thinking: bool | None) -> None:
    """Refuse limits that are none, and a budget for thinking that is off.

    Raises:
        UsageError: The flag is named.
    """
    for name in ("max_samples", "max_new_tokens", "thinking_budget"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: a number from 1 on.")
    if config.thinking_budget and thinking is False:
        raise UsageError("--thinking_budget is for answers with thinking. Give --think_chain true.")
