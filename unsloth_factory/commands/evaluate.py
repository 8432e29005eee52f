"""`uf evaluate`: a multiple-choice benchmark by log-probabilities, base and tuned from one load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.evaluating.endpoint import run_endpoint
from unsloth_factory.commands.evaluating.free import run_free
from unsloth_factory.commands.evaluating.generated import run_generated
from unsloth_factory.commands.evaluating.gguf import score_files
from unsloth_factory.commands.evaluating.harness import run_harness
from unsloth_factory.commands.evaluating.identity import model_identity
from unsloth_factory.commands.evaluating.many import run_models, run_tasks
from unsloth_factory.commands.evaluating.setup import scored_setup
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.choice.benchmark import load_benchmark, select_subjects
from unsloth_factory.evaluation.choice.kept_scores import KeptScores
from unsloth_factory.evaluation.choice.scored import ChoiceResult, evaluate, model_scorers
from unsloth_factory.evaluation.generated.generation_task import load_generation_task
from unsloth_factory.evaluation.harness.model import PREFIX
from unsloth_factory.evaluation.pages import markdown_page
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.run.atomic import write_json, write_text


def run(config: EvaluateConfig) -> int:
    """Score the benchmark, save report and records, print the tables."""
    elsewhere = "--gguf" if config.gguf else "--endpoint" if config.remote.endpoint else ""
    if elsewhere and (config.models or config.choice_mode == "generate" or "," in config.task or PREFIX in config.task):
        raise UsageError(f"{elsewhere}: one --task; no --models, --choice_mode generate or {PREFIX}NAME.")
    if config.models:
        return run_models(config, run)
    if "," in config.task:
        return run_tasks(config, run)
    if config.task.startswith(PREFIX):
        return run_harness(config)
    if config.remote.endpoint:
        return run_endpoint(config, _task_folder)
    generated = load_generation_task(config.task)
    if generated:
        folder = _task_folder(generated.name, generated.layout, generated.folder, config.task_dir)
        return run_generated(config, generated, folder)
    if config.scorer:
        raise UsageError(f"--scorer is for questions with reference answers; {config.task} is of multiple choice.")
    console = Console()
    benchmark = load_benchmark(config.task)
    benchmark.prompt(config.lang)
    free = config.choice_mode == "generate"
    limits = (config.max_samples, config.max_new_tokens, config.thinking_budget)
    if not free and any(limit is not None for limit in limits):
        raise UsageError(
            "--max_samples, --max_new_tokens and --thinking_budget are for generated answers; "
            f"{config.task} is scored without any. --subjects takes a part of it, --choice_mode generate asks freely."
        )
    folder = _task_folder(benchmark.name, benchmark.layout, benchmark.folder, config.task_dir)
    if free:
        result, target = run_free(config, benchmark, folder, console)
        return _show(result, target, f"{benchmark.name}_generated", console)
    split = config.split or benchmark.default_split
    if config.gguf:
        result, target = score_files(config, benchmark, folder, split, console)
        return _show(result, target, f"{benchmark.name}_gguf", console)
    # Before the weights are loaded: a misspelt subject must not cost a minute.
    select_subjects(benchmark, folder, split, config.subjects)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    loaded, template = load_source(resolved, console)
    maker, options = scored_setup(config, benchmark, split, template, loaded.max_positions)
    scorers = model_scorers(loaded, resolved.variants, config.batch_size)
    target = resolved.results("evaluation_results", config.save_dir)
    subjects = target / f"{benchmark.name}_subjects"
    kept: dict[str, KeptScores] = {
        variant: KeptScores(subjects, model_identity(variant, resolved, loaded)) for variant in resolved.variants
    }
    with counting(console, f"{benchmark.title}: subjects") as progress:
        description = resolved.description(loaded)
        result = evaluate(maker, folder, scorers, options, model=description, kept=kept, on_progress=progress)
    found = sum(scores.found for scores in kept.values())
    if found:
        line = f"{found} subjects' scores by the same model on the same prompts were there: {subjects}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    return _show(result, target, benchmark.name, console)


def _show(result: ChoiceResult, target: Path, name: str, console: Console) -> int:
    print_report(result.report, console)
    for path in save(result, target, name):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def save(result: ChoiceResult, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, .md, NAME_samples.jsonl and, for a split without answers, NAME_submission[_VARIANT].json."""
    paths = [
        write_json(folder / f"{name}.json", result.report.to_dict()),
        write_text(folder / f"{name}.md", markdown_page(result.report)),
        write_text(folder / f"{name}_samples.jsonl", "".join(map(_line, result.records))),
    ]
    for variant, letters in result.submissions.items():
        suffix = f"_{variant}" if len(result.submissions) > 1 else ""
        paths.append(write_json(folder / f"{name}_submission{suffix}.json", letters))
    return paths


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _task_folder(name: str, layout: str, default: str | None, task_dir: str | None) -> Path:
    folder = task_dir or default
    if folder is None:
        raise UsageError(f"--task {name} needs --task_dir FOLDER: its data, as published ({layout}).")
    if not Path(folder).expanduser().is_dir():
        raise UsageError(f"--task_dir {folder} is no folder.")
    return Path(folder).expanduser()
