"""`uf evaluate --endpoint`: a benchmark by a server's model, which is the only variant, by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.endpoint import description, remote_model, resolve_asked
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.choice.benchmark import load_benchmark, select_subjects
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, ChoiceResult, evaluate
from unsloth_factory.evaluation.generated.generation_task import (
    GenerationTask,
    check_split,
    load_generation_task,
    read_problems,
)
from unsloth_factory.evaluation.generated.generative import GenerativeOptions, GenerativeResult, evaluate_generated
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.inference.generate import Generation
from unsloth_factory.run.atomic import write_json, write_text

TaskFolder = Callable[[str, str, str | None, str | None], Path]
"""(name, layout, default folder, --task_dir) -> the benchmark's data."""


def run_endpoint(config: EvaluateConfig, task_folder: TaskFolder) -> int:
    """Ask the server, save report and records, print the tables.

    Raises:
        UsageError: A flag that needs the model's own tokenizer.
    """
    if config.choice_mode != "letter" or config.no_chat_template:
        raise UsageError("--endpoint scores the letters behind chat prompts: no --choice_mode, no --no_chat_template.")
    console = Console()
    resolved = resolve_asked(config.source, config.model, config.remote, quantization_bit=config.quantization_bit)
    task = load_generation_task(config.task)
    if task:
        name, folder = task.name, task_folder(task.name, task.layout, task.folder, config.task_dir)
        asked = _generated(config, resolved, task, folder, console)
        report, records, submissions = asked.report, asked.records, {}
    else:
        benchmark = load_benchmark(config.task)
        name, folder = benchmark.name, task_folder(benchmark.name, benchmark.layout, benchmark.folder, config.task_dir)
        scored = _choices(config, folder, console)
        report, records, submissions = scored.report, scored.records, scored.submissions
    print_report(report, console)
    target = resolved.results("evaluation_results", config.save_dir)
    for path in _save(report, records, submissions, target, f"{name}_endpoint"):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _generated(
    config: EvaluateConfig, resolved: ResolvedModel, task: GenerationTask, folder: Path, console: Console
) -> GenerativeResult:
    """Answers with a number at their end."""
    lang: str = config.lang or next(iter(task.prompts))
    if lang not in task.prompts:
        raise UsageError(f"--lang {lang}: {task.name} has prompts in {', '.join(task.prompts)}.")
    split = config.split or task.scored_splits[0]
    options = GenerativeOptions(
        n_shot=_shots(config),
        split=split,
        lang=lang,
        thinking=resolved.thinking if config.think_chain is None else config.think_chain,
        max_samples=config.max_samples,
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
    )
    check_split(task, split, options.n_shot)
    read_problems(task, folder, split)  # a missing file is named before the server is asked for its models
    remote = remote_model(config.remote, options.thinking)
    with counting(console, f"{task.title}: answers") as progress:

        def answer(prompts: Sequence[list[int]]) -> list[Generation]:
            return remote.answer(prompts, max_new_tokens=options.max_new_tokens, on_progress=progress)

        answerers = {remote.endpoint.model: answer}
        result = evaluate_generated(task, remote.template, folder, answerers, options, model=description(remote))
    return replace(result, records=_counted(result.records, remote.prompt_tokens))


def _choices(config: EvaluateConfig, folder: Path, console: Console) -> ChoiceResult:
    """Letters by the log-probabilities that the server gives."""
    if config.max_samples is not None or config.max_new_tokens is not None:
        raise UsageError(
            f"--max_samples and --max_new_tokens are for generated answers; {config.task} is scored without any. "
            "--subjects takes a part of it."
        )
    benchmark = load_benchmark(config.task)
    benchmark.prompt(config.lang)
    split = config.split or benchmark.default_split
    select_subjects(benchmark, folder, split, config.subjects)
    remote = remote_model(config.remote, bool(config.think_chain))
    maker = PromptMaker(
        benchmark=benchmark,
        tokenizer=None,
        template=remote.template,
        lang=config.lang or next(iter(benchmark.prompts)),
        thinking=remote.thinking,
    )
    options = ChoiceOptions(n_shot=_shots(config), split=split, subjects=config.subjects)
    with counting(console, f"{benchmark.title}: subjects") as progress:
        scorers = {remote.endpoint.model: remote.letter_logprobs}
        result = evaluate(maker, folder, scorers, options, model=description(remote), on_progress=progress)
    result = replace(result, records=_counted(result.records, remote.prompt_tokens))
    if not remote.unknown:
        return result
    note = (
        f"In {remote.unknown} questions no letter was among the likeliest first tokens: these were answered by chance. "
        "(A model that thinks first: --think_chain false. A base model: more --n_shot.)"
    )
    return replace(result, report=replace(result.report, notes=(*result.report.notes, note)))


def _shots(config: EvaluateConfig) -> int:
    return 5 if config.n_shot is None else config.n_shot


def _counted(records: Sequence[dict[str, Any]], tokens: Sequence[int]) -> list[dict[str, Any]]:
    """The records with the prompts' tokens as the server counted them."""
    return [{**record, "prompt_tokens": count} for record, count in zip(records, tokens, strict=True)]


def _save(
    report: EvalReport, records: Sequence[dict[str, Any]], submissions: Mapping[str, Any], folder: Path, name: str
) -> list[Path]:
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records]
    paths = [
        write_json(folder / f"{name}.json", report.to_dict()),
        write_text(folder / f"{name}_samples.jsonl", "".join(lines)),
    ]
    return paths + [write_json(folder / f"{name}_submission.json", letters) for letters in submissions.values()]
