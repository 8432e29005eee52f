"""`uf evaluate`: a multiple-choice benchmark by log-probabilities, base and tuned from one load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.evaluate_endpoint import run_endpoint
from unsloth_factory.commands.evaluate_generated import run_generated
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel, load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.benchmark import load_benchmark, select_subjects
from unsloth_factory.evaluation.choice import ChoiceOptions, ChoiceResult, evaluate, model_scorers
from unsloth_factory.evaluation.generation_task import load_generation_task
from unsloth_factory.evaluation.kept_scores import KeptScores
from unsloth_factory.evaluation.prompts import PromptMaker
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.model.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.atomic import sha256, write_json, write_text


def run(config: EvaluateConfig) -> int:
    """Score the benchmark, save report and records, print the tables."""
    if config.remote.endpoint:
        return run_endpoint(config, _task_folder)
    generated = load_generation_task(config.task)
    if generated:
        return run_generated(config, generated, _task_folder(generated.name, generated.layout, None, config.task_dir))
    if config.max_samples is not None or config.max_new_tokens is not None:
        raise UsageError(
            f"--max_samples and --max_new_tokens are for generated answers; {config.task} is scored without any. "
            "--subjects takes a part of it."
        )
    console = Console()
    benchmark = load_benchmark(config.task)
    benchmark.prompt(config.lang)
    folder = _task_folder(benchmark.name, benchmark.layout, benchmark.folder, config.task_dir)
    split = config.split or benchmark.default_split
    # Before the weights are loaded: a misspelt subject must not cost a minute.
    select_subjects(benchmark, folder, split, config.subjects)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    loaded, template = load_source(resolved, console)
    maker = PromptMaker(
        benchmark=benchmark,
        tokenizer=loaded.tokenizer,
        template=None if config.no_chat_template else template,
        lang=config.lang or next(iter(benchmark.prompts)),
        thinking=bool(config.think_chain),
        mode="letter" if config.choice_mode == "letter" else "text",
    )
    options = ChoiceOptions(
        n_shot=config.n_shot,
        split=split,
        subjects=config.subjects,
        per_character=config.choice_mode == "text_normalized",
        max_tokens=loaded.max_positions,
    )
    scorers = model_scorers(loaded, resolved.variants, config.batch_size)
    target = resolved.results("evaluation_results", config.save_dir)
    subjects = target / f"{benchmark.name}_subjects"
    kept: dict[str, KeptScores] = {
        variant: KeptScores(subjects, _identity(variant, resolved, loaded)) for variant in resolved.variants
    }
    with counting(console, f"{benchmark.title}: subjects") as progress:
        description = resolved.description(loaded)
        result = evaluate(maker, folder, scorers, options, model=description, kept=kept, on_progress=progress)
    found = sum(scores.found for scores in kept.values())
    if found:
        line = f"{found} subjects' scores by the same model on the same prompts were there: {subjects}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    print_report(result.report, console)
    for path in save(result, target, benchmark.name):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _identity(variant: str, resolved: ResolvedModel, loaded: LoadedModel) -> str:
    """All of the model that its scores depend on; the base does not depend on the adapter."""
    parts: dict[str, Any] = {
        "fingerprint": loaded.fingerprint,
        "engine": loaded.engine,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "quantized": loaded.quantized,
    }
    if variant == "tuned" and resolved.settings.adapter:
        folder = Path(resolved.settings.adapter).expanduser()
        parts["adapter"] = {name: sha256(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    return json.dumps(parts, sort_keys=True)


def save(result: ChoiceResult, folder: Path, name: str) -> list[Path]:
    """Write NAME.json, NAME_samples.jsonl and, for a split without answers, NAME_submission[_VARIANT].json."""
    paths = [
        write_json(folder / f"{name}.json", result.report.to_dict()),
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
