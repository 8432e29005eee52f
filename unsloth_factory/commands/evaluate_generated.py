"""`uf evaluate` where the answers are generated (GSM8K): greedy, base and tuned from one load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.generation_task import GenerationTask, check_split, read_problems
from unsloth_factory.evaluation.generative import Answerer, GenerativeOptions, GenerativeResult, evaluate_generated
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.inference.generate import Generation, Progress, generate
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.atomic import write_json, write_text


def run_generated(config: EvaluateConfig, task: GenerationTask, folder: Path) -> int:
    """Ask the questions, save report and records, print the table."""
    console = Console()
    lang: str = config.lang or next(iter(task.prompts))
    _refuse(config, task, lang)
    split = config.split or task.scored_splits[0]
    # Before the weights are loaded: a missing file must not cost a minute.
    check_split(task, split, config.n_shot)
    read_problems(task, folder, split)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    loaded, template = load_source(resolved, console)
    options = GenerativeOptions(
        n_shot=config.n_shot,
        split=split,
        lang=lang,
        thinking=resolved.thinking if config.think_chain is None else config.think_chain,
        max_samples=config.max_samples,
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        max_tokens=loaded.max_positions,
    )
    with counting(console, f"{task.title}: answers") as progress:
        answerers: dict[str, Answerer] = {
            variant: _answerer(loaded, template, variant, config.batch_size, options.max_new_tokens, progress)
            for variant in resolved.variants
        }
        description = resolved.description(loaded)
        result = evaluate_generated(task, template, folder, answerers, options, model=description)
    print_report(result.report, console)
    for path in _save(result, resolved.results("evaluation_results", config.save_dir), task.name):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _refuse(config: EvaluateConfig, task: GenerationTask, lang: str) -> None:
    if lang not in task.prompts:
        raise UsageError(f"--lang {lang}: {task.name} has prompts in {', '.join(task.prompts)}.")
    if config.no_chat_template:
        raise UsageError(
            f"--no_chat_template: the answers of {task.name} are generated, which needs the chat template."
        )
    if config.subjects or config.choice_mode != "letter":
        raise UsageError(f"--subjects and --choice_mode are for multiple choice; {task.name} has neither.")
    for name, value in (("max_samples", config.max_samples), ("max_new_tokens", config.max_new_tokens)):
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: a number from 1 on.")


def _answerer(
    loaded: LoadedModel, template: ChatTemplate, variant: str, batch_size: int, longest: int, progress: Progress
) -> Answerer:
    def answer(prompts: Sequence[list[int]]) -> list[Generation]:
        return generate(
            loaded,
            prompts,
            stop_ids=template.stop_ids,
            max_new_tokens=longest,
            batch_size=batch_size,
            on_progress=progress,
        )

    def base(prompts: Sequence[list[int]]) -> list[Generation]:
        with loaded.adapter_disabled():
            return answer(prompts)

    return base if variant == "base" else answer


def _save(result: GenerativeResult, folder: Path, name: str) -> list[Path]:
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in result.records]
    return [
        write_json(folder / f"{name}.json", result.report.to_dict()),
        write_text(folder / f"{name}_samples.jsonl", "".join(lines)),
    ]
