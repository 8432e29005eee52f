"""`uf evaluate --endpoint` where choices are scored: the letters' log-probabilities as the server gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.endpoint import description, remote_model
from unsloth_factory.commands.progress import counting
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.benchmark import Benchmark
from unsloth_factory.evaluation.choice import ChoiceOptions, ChoiceResult, evaluate
from unsloth_factory.evaluation.prompts import PromptMaker


def evaluate_endpoint(
    config: EvaluateConfig, benchmark: Benchmark, folder: Path, split: str, console: Console
) -> ChoiceResult:
    """Score a benchmark of multiple choice by one model behind an address; it is the only variant, by its name.

    Raises:
        UsageError: A flag that needs the model's own tokenizer.
    """
    if config.choice_mode != "letter" or config.no_chat_template:
        raise UsageError("--endpoint scores the letters behind chat prompts: no --choice_mode, no --no_chat_template.")
    remote = remote_model(config.remote, bool(config.think_chain))
    maker = PromptMaker(
        benchmark=benchmark,
        tokenizer=None,
        template=remote.template,
        lang=config.lang or next(iter(benchmark.prompts)),
        thinking=remote.thinking,
    )
    options = ChoiceOptions(n_shot=config.n_shot, split=split, subjects=config.subjects)
    with counting(console, f"{benchmark.title}: subjects") as progress:
        scorers = {remote.endpoint.model: remote.letter_logprobs}
        result = evaluate(maker, folder, scorers, options, model=description(remote), on_progress=progress)
    counted = zip(result.records, remote.prompt_tokens, strict=True)
    result = replace(result, records=[{**record, "prompt_tokens": tokens} for record, tokens in counted])
    if not remote.unknown:
        return result
    note = (
        f"In {remote.unknown} questions no letter was among the likeliest first tokens: these were answered by chance. "
        "(A model that thinks first: --think_chain false. A base model: more --n_shot.)"
    )
    return replace(result, report=replace(result.report, notes=(*result.report.notes, note)))
