"""`uf evaluate --choice_mode generate`: multiple choice by generated answers, with or without thinking."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.evaluating.answering import ModelAnswers, check_limits
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.choice.benchmark import Benchmark, select_subjects
from unsloth_factory.evaluation.choice.generated import evaluate_choices_generated
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, ChoiceResult

LONGEST, LONGEST_THINKING = 512, 2048
"""Longest answer, tokens, without thinking (or behind a thinking budget) and with."""


def run_free(config: EvaluateConfig, benchmark: Benchmark, folder: Path, console: Console) -> tuple[ChoiceResult, Path]:
    """Ask the questions.

    Returns:
        The result, and the folder where it belongs.
    """
    if config.no_chat_template:
        raise UsageError("--choice_mode generate needs the chat template: --no_chat_template does not go with it.")
    if config.max_samples is not None:
        raise UsageError(f"--max_samples: {benchmark.name} has subjects; --subjects takes a part of it.")
    check_limits(config, config.think_chain)
    split = config.split or benchmark.default_split
    select_subjects(benchmark, folder, split, config.subjects)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    thinking = resolved.thinking if config.think_chain is None else config.think_chain
    check_limits(config, thinking)
    loaded, template = load_source(resolved, console)
    maker = PromptMaker(
        benchmark=benchmark,
        tokenizer=loaded.tokenizer,
        template=template,
        lang=config.lang or next(iter(benchmark.prompts)),
        thinking=thinking,
        mode="generate",
    )
    options = ChoiceOptions(n_shot=config.shots, split=split, subjects=config.subjects, max_tokens=loaded.max_positions)
    longest = config.max_new_tokens or (LONGEST_THINKING if thinking and not config.thinking_budget else LONGEST)
    target = resolved.results("evaluation_results", config.save_dir)
    answers = ModelAnswers(
        resolved, loaded, template, thinking=thinking, longest=longest, config=config,
        folder=target / f"{benchmark.name}_answers",
    )  # fmt: skip
    with counting(console, f"{benchmark.title}: answers") as progress:
        result = evaluate_choices_generated(
            maker,
            folder,
            answers.answerers(progress),
            options,
            room=answers.room,
            settings={"max_new_tokens": longest, "thinking_budget": config.thinking_budget},
            model=resolved.description(loaded),
        )
    answers.print_found(console)
    return result, target
