"""`uf evaluate` where the answers are generated (GSM8K): greedy, base and tuned from one load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.evaluating.answering import ModelAnswers, check_limits
from unsloth_factory.commands.evaluating.gguf import answer_with_files
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.generated.generation_task import GenerationTask, check_split, read_problems
from unsloth_factory.evaluation.generated.generative import GenerativeOptions, GenerativeResult, evaluate_generated
from unsloth_factory.evaluation.pages import markdown_page
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.run.atomic import write_json, write_text


def run_generated(config: EvaluateConfig, task: GenerationTask, folder: Path) -> int:
    """Ask the questions, save report and records, print the table."""
    console = Console()
    task = replace(task, scorer=config.scorer or task.scorer)
    lang: str = config.lang or next(iter(task.prompts))
    _refuse(config, task, lang)
    split = config.split or task.scored_splits[0]
    if config.gguf:
        result, target = answer_with_files(config, task, folder, split, console)
        return _finish(result, target, f"{task.name}_gguf", console)
    # Before the weights are loaded: a missing file must not cost a minute.
    check_split(task, split, config.shots)
    read_problems(task, folder, split)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    thinking = resolved.thinking if config.think_chain is None else config.think_chain
    check_limits(config, thinking)
    loaded, template = load_source(resolved, console)
    longest = config.max_new_tokens or task.max_new_tokens
    target = resolved.results("evaluation_results", config.save_dir)
    answers = ModelAnswers(
        resolved, loaded, template, thinking=thinking, longest=longest, config=config,
        folder=target / f"{task.name}_answers",
    )  # fmt: skip
    options = GenerativeOptions(
        n_shot=config.shots,
        split=split,
        lang=lang,
        thinking=thinking,
        max_samples=config.max_samples,
        max_new_tokens=longest,
        thinking_budget=config.thinking_budget,
        room=answers.room,
        max_tokens=loaded.max_positions,
    )
    with counting(console, f"{task.title}: answers") as progress:
        description = resolved.description(loaded)
        result = evaluate_generated(task, template, folder, answers.answerers(progress), options, model=description)
    answers.print_found(console)
    return _finish(result, target, task.name, console)


def _finish(result: GenerativeResult, folder: Path, name: str, console: Console) -> int:
    print_report(result.report, console)
    for path in _save(result, folder, name):
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
    check_limits(config, config.think_chain)


def _save(result: GenerativeResult, folder: Path, name: str) -> list[Path]:
    lines = [json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in result.records]
    return [
        write_json(folder / f"{name}.json", result.report.to_dict()),
        write_text(folder / f"{name}.md", markdown_page(result.report)),
        write_text(folder / f"{name}_samples.jsonl", "".join(lines)),
    ]
