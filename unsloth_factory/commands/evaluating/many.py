"""`uf evaluate` of several tasks (what was forgotten) or of several models (which one to build on)."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unsloth_factory.commands.source import keeping_loaded, load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun
from unsloth_factory.evaluation.choice.benchmark import TABLES, load_benchmark
from unsloth_factory.evaluation.compare import forgetting, selection
from unsloth_factory.evaluation.compare.outcome import Outcome, read_outcome
from unsloth_factory.evaluation.compare.selection import Candidate
from unsloth_factory.evaluation.generated.generation_task import load_generation_task
from unsloth_factory.evaluation.harness.model import PREFIX
from unsloth_factory.run.atomic import write_json, write_text
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training.memory.meter import meter_of

Run = Callable[[EvaluateConfig], int]
"""One task, one model."""


def result_name(config: EvaluateConfig) -> str:
    """Name of the files that a task's results go to.

    Raises:
        UsageError: No such benchmark.
    """
    if config.task.startswith(PREFIX):
        return "lm_eval_" + re.sub(r"[^\w.-]+", "_", config.task.removeprefix(PREFIX))
    generated = load_generation_task(config.task)
    if generated:
        return generated.name
    return load_benchmark(config.task).name + ("_generated" if config.choice_mode == "generate" else "")


def run_tasks(config: EvaluateConfig, run: Run) -> int:
    """Score each of the tasks by one load, and show what base and tuned differ in."""
    console = Console()
    parts = [part.strip() for part in config.task.split(",") if part.strip()]
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    target = resolved.results("evaluation_results", config.save_dir)
    if config.subjects:
        raise UsageError("--subjects is for one task.")
    configs = [_single(config, task) for task in parts]
    names = [result_name(each) for each in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"--task {config.task}: {', '.join(twice)} is named twice.")
    outcomes = []
    with keeping_loaded():
        for each, name in zip(configs, names, strict=True):
            console.rule(each.task)
            run(replace(each, save_dir=str(target)))
            outcomes.append(read_outcome(target, name))
    collected = forgetting.collect(outcomes)
    _print(console, "Base and tuned over tasks", forgetting.HEAD, forgetting.rows(collected), worse=forgetting.LOSS)
    console.print(forgetting.conclusion(collected), highlight=False, markup=False, soft_wrap=True)
    _saved(
        console,
        write_json(target / "tasks.json", collected.to_dict()),
        write_text(target / "tasks.md", forgetting.markdown(collected)),
    )
    return 0


def _single(config: EvaluateConfig, task: str) -> EvaluateConfig:
    """The settings of one of several tasks: its folder below --task_dir, and no flag that it has no use for."""
    config = replace(config, task=task)
    theirs = task.startswith(PREFIX)
    if theirs or task.endswith(TABLES):
        config = replace(config, task_dir=None)
    elif config.task_dir and (Path(config.task_dir).expanduser() / Path(task).stem).is_dir():
        config = replace(config, task_dir=str(Path(config.task_dir) / Path(task).stem))
    if theirs:
        return replace(config, choice_mode="letter", lang=None, split=None, scorer=None, thinking_budget=None)
    if load_generation_task(task):
        return replace(config, choice_mode="letter")
    if config.choice_mode == "generate":
        return replace(config, max_samples=None, scorer=None)
    return replace(config, max_samples=None, max_new_tokens=None, thinking_budget=None, scorer=None)


def run_models(config: EvaluateConfig, run: Run) -> int:
    """Score each model by itself, and set the scores against size, memory and speed."""
    console = Console()
    names = list(dict.fromkeys(part.strip() for part in (config.models or "").split(",") if part.strip()))
    if config.source.run or config.model.model or config.model.adapter:
        raise UsageError("--models names all models: --run, --model and --adapter do not go with it.")
    if len(names) < 2 or "," in config.task:
        raise UsageError("--models A B C: two models or more, and one --task.")
    missing = [name for name in names if name[0] in "/.~" and not Path(name).expanduser().exists()]
    if missing:
        raise UsageError(f"--models: there is no {', '.join(missing)}.")
    name = result_name(config)
    target = Path(config.save_dir or "output/models")
    candidates, outcome = [], None
    for place, model in enumerate(names, start=1):
        console.rule(f"{place}/{len(names)} {model}")
        folder = target / f"{place}-{re.sub(r'[^A-Za-z0-9.-]+', '_', model).strip('_')[-60:]}"
        candidate, found = _measure(replace(config, models=None, save_dir=str(folder)), model, name, run, console)
        candidates.append(candidate)
        outcome = found or outcome
    if outcome is None:
        raise UserError("No model could be scored: " + "; ".join(f"{c.name}: {c.failed}" for c in candidates))
    chosen = selection.select(outcome.task, outcome.headline, candidates)
    title = f"{chosen.task}: {chosen.metric}, {outcome.n} questions, ± standard error"
    shown = [row[: selection.SHOWN] for row in selection.rows(chosen)]
    _print(console, title, selection.HEAD[: selection.SHOWN], shown, worse="worse")
    for note in chosen.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    _saved(
        console,
        write_json(target / "models.json", chosen.to_dict()),
        write_text(target / "models.md", selection.markdown(chosen)),
        write_text(target / "models.html", selection.html(chosen)),
    )
    return 0


def _measure(
    config: EvaluateConfig, model: str, name: str, run: Run, console: Console
) -> tuple[Candidate, Outcome | None]:
    """Load, score and free one model; one that cannot be does not end the comparison."""
    import torch

    is_run = RunFolder(Path(model).expanduser()).manifest.is_file()
    source = FinishedRun(run=model) if is_run else config.source
    config = replace(config, source=source, model=config.model if is_run else replace(config.model, model=model))
    folder = Path(config.save_dir or "")
    resumed = any(folder.glob("*_subjects/*")) or any(folder.glob("*_answers/*"))
    try:
        with keeping_loaded():
            resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
            start = time.perf_counter()
            loaded, _ = load_source(resolved, console)
            load_seconds = time.perf_counter() - start
            meter = meter_of(loaded)
            meter.reset_peak()
            start = time.perf_counter()
            run(config)
            seconds = time.perf_counter() - start
            outcome = read_outcome(folder, name)
            variant = list(outcome.metrics)[-1]  # a run's tuned model
            candidate = Candidate(
                name=model,
                parameters=loaded.parameter_counts()[1],
                disk_bytes=_weights(loaded.path),
                memory_bytes=meter.read().peak,
                load_seconds=load_seconds,
                seconds=0.0 if resumed else seconds / len(outcome.metrics),
                n=outcome.n,
                score=outcome.score(variant),
                values=outcome.values[variant],
            )
            del loaded
        meter.release()
    except (UserError, torch.OutOfMemoryError) as error:
        console.print(f"{model}: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        return Candidate(name=model, failed=str(error).splitlines()[0]), None
    return candidate, outcome


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _print(console: Console, title: str, head: Sequence[str], rows: Sequence[Sequence[str]], worse: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for place, column in enumerate(head):
        table.add_column(column, justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
    for row in rows:
        style = "red" if any(cell.endswith(worse) for cell in row) else None
        table.add_row(*map(Text, row), style=style)
    console.print(table)


def _saved(console: Console, *paths: Path) -> None:
    for path in paths:
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
