"""`uf run plan.yaml`: the stages of a plan in order, each skipped when its inputs are unchanged."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory import __version__
from unsloth_factory.commands.planning.space import require_plan_space
from unsloth_factory.commands.summary import write_summary
from unsloth_factory.config.commands import RunPlanConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.fields import settings_of
from unsloth_factory.config.parse import canonical, flat_values, from_mapping, suggestion
from unsloth_factory.config.table import COMMANDS
from unsloth_factory.config.yaml_file import LinedDict, read_yaml
from unsloth_factory.run.atomic import SUMS_NAME
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.run.stages import StageCache, files_below, stage_key

TRAINING = ("sft", "dpo")
PATH_SETTINGS = ("dataset", "eval_dataset", "dataset_dir", "model", "adapter", "domain", "task_dir", "chat_template")
# Several stages write into these; a later stage's change must not make an earlier one run again.
COMMON_FILES = (SUMS_NAME, "parity.json")
# What each command of a plan makes in the run folder, and which earlier results it reads.
OUTPUTS = {
    "sft": ("final_adapter", "final_model", "run.yaml", "validation_split.jsonl"),
    "dpo": ("final_adapter", "final_model", "run.yaml", "validation_split.jsonl"),
    "validate": ("validation_results",),
    "evaluate": ("evaluation_results",),
    "merge": ("merged_model",),
    "gguf": ("gguf",),
    "quantize": ("gguf", "quality_results"),
    "quality": ("quality_results",),
    "deploy": ("Modelfile",),
}
READS = {
    "sft": TRAINING,
    "dpo": TRAINING,
    "validate": TRAINING,
    "evaluate": TRAINING,
    "merge": TRAINING,
    "gguf": ("merge",),
    "quantize": ("gguf",),
    "quality": (*TRAINING, "gguf", "quantize"),
    "deploy": ("gguf", "quantize", "quality"),
}


@dataclass(frozen=True)
class Stage:
    """One checked stage of a plan."""

    label: str
    """The command, numbered when it stands in the plan more than once: "validate-2"."""
    command: str
    config: Any
    folder: Path
    """Run folder that it works on."""


def run(config: RunPlanConfig) -> int:
    """Run a plan file."""
    if config.plan is None:
        raise UsageError("uf run needs a plan file: uf run plan.yaml")
    return run_plan(Path(config.plan), config.output_dir, force=config.force)


def run_plan(path: Path, output_dir: str | None, *, force: bool = False) -> int:
    """Check every stage's settings, then run them; the first that fails ends the plan.

    Raises:
        UsageError: The plan is wrong; nothing was started.
    """
    started = time.monotonic()
    root, stages = read_plan(path, output_dir)
    console = Console()
    require_plan_space(root, stages)
    root.mkdir(parents=True, exist_ok=True)
    cache = StageCache(root / "stages.json")
    keys: dict[str, str] = {}
    seconds: dict[str, float] = {}
    for number, stage in enumerate(stages, 1):
        keys[stage.label] = key = _key(stage, stages[: number - 1], keys)
        title = f"[{number}/{len(stages)}] {stage.label}"
        hit = None if force else cache.hit(stage.label, key)
        if hit is not None:
            console.print(f"{title}: unchanged, skipped", style="dim", highlight=False)
            seconds[stage.label] = hit["figures"]["seconds"]
            continue
        console.rule(title, align="left")
        begun, before = time.monotonic(), _changes(stage)
        outdated = cache.forget(stage.label)
        # A training's --time_budget begins with its stage, not with the process.
        clock = {"started": begun} if stage.command in TRAINING else {}
        code = COMMANDS[stage.command].load()(_started_anew(stage) if force else stage.config, **clock)
        if code != 0:
            return code
        seconds[stage.label] = round(time.monotonic() - begun, 1)
        made = [path for path, change in _changes(stage).items() if before.get(path) != change]
        _remove_stale(stage, outdated, made)
        cache.store(stage.label, key, made, {"seconds": seconds[stage.label]})
    write_summary(RunFolder(stages[-1].folder), root, seconds, time.monotonic() - started)
    return 0


def read_plan(path: Path, output_dir: str | None) -> tuple[Path, list[Stage]]:
    """Read and check a plan; settings outside `stages` go to every stage that knows them.

    `${plan_dir}` in a value stands for the plan file's folder.

    Raises:
        UsageError: Naming the file, stage and setting.
    """
    plan = {str(k): _expand(v, str(path.resolve().parent)) for k, v in read_yaml(path).items()}
    entries = plan.pop("stages", None)
    if not isinstance(entries, list) or not entries:
        raise UsageError(f"{path}: a plan needs a list `stages:` such as `- sft: {{dataset: data.csv}}`")
    root = _folder(output_dir or plan.pop("output_dir", None) or f"output/{path.stem}", str(path))
    plan.pop("output_dir", None)
    pairs = [_entry(entry, index, path) for index, entry in enumerate(entries, 1)]
    _check_common(plan, pairs, path)
    several = sum(command in TRAINING for command, _ in pairs) > 1
    folder = root
    stages: list[Stage] = []
    for entry, (command, values) in zip(entries, pairs, strict=True):
        where = f"{path}:{entry.lines[command]}: {command}" if isinstance(entry, LinedDict) else f"{path}: {command}"
        if command in TRAINING:
            default = root / _label(command, stages) if several else root
            folder = _folder(values.get("output_dir") or str(default), where)
        settings = _stage_settings(command, {**_known(plan, command), **values}, folder, stages)
        config = from_mapping(COMMANDS[command].config_type, settings, where, command).config
        stages.append(Stage(_label(command, stages), command, config, folder))
    return root, stages


def _folder(value: Any, where: str) -> Path:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: output_dir {value!r}: the name of a folder is expected")
    return Path(str(value)).expanduser()


def _entry(entry: Any, index: int, path: Path) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        entry = {entry: None}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UsageError(f"{path}: stage {index} must be one command with its settings, `- sft: {{epochs: 3}}`")
    command, values = next(iter(entry.items()))
    if command not in OUTPUTS:
        raise UsageError(
            f"{path}: stage {index}: {command} is no stage.{suggestion(str(command), OUTPUTS)} "
            f"Stages: {', '.join(OUTPUTS)}."
        )
    if values is not None and not isinstance(values, dict):
        raise UsageError(f"{path}: stage {index}, {command}: expected settings, got {values!r}")
    table = settings_of(COMMANDS[command].config_type)
    return command, {canonical(str(key), table): value for key, value in (values or {}).items()}


def _check_common(plan: dict[str, Any], pairs: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    known = {key for command, _ in pairs for key in settings_of(COMMANDS[command].config_type)}
    for key in plan:
        tables = [settings_of(COMMANDS[command].config_type) for command, _ in pairs]
        if not any(canonical(key, table) in table for table in tables):
            raise UsageError(f"{path}: {key}: no stage of this plan has this setting.{suggestion(key, known)}")


def _known(plan: dict[str, Any], command: str) -> dict[str, Any]:
    """The plan's common settings that this command has. After the training, the run folder answers for the model."""
    table = settings_of(COMMANDS[command].config_type)
    skip = () if command in TRAINING else ("model", "domain", "adapter", "dataset", "chat_template", "system")
    return {k: v for k, v in plan.items() if canonical(k, table) in table and canonical(k, table) not in skip}


def _stage_settings(command: str, values: dict[str, Any], folder: Path, before: list[Stage]) -> dict[str, Any]:
    trainings = [stage for stage in before if stage.command in TRAINING]
    if command not in TRAINING:
        made_here = {"overwrite": True} if command == "merge" else {}
        return {"run": str(folder), **made_here, **values}
    settings: dict[str, Any] = {**values, "output_dir": str(folder)}
    if not settings.get("overwrite"):
        settings.setdefault("resume", "auto")
    if not trainings:
        return settings
    earlier = RunFolder(trainings[-1].folder)
    if trainings[-1].config.tuning.finetuning_type == "lora":
        return {"adapter": str(earlier.final_adapter)} | settings
    return settings | ({} if "model" in values else {"model": str(earlier.final_model)})


def _label(command: str, before: list[Stage]) -> str:
    count = sum(stage.command == command for stage in before)
    return command if count == 0 else f"{command}-{count + 1}"


def _expand(value: Any, plan_dir: str) -> Any:
    if isinstance(value, str):
        return value.replace("${plan_dir}", plan_dir)
    if isinstance(value, dict):
        expanded = LinedDict()
        expanded.update((key, _expand(item, plan_dir)) for key, item in value.items())
        expanded.lines = getattr(value, "lines", {})
        return expanded
    if isinstance(value, list):
        return [_expand(item, plan_dir) for item in value]
    return value


def _reads(stage: Stage) -> tuple[str, ...]:
    if stage.command in ("validate", "evaluate") and getattr(stage.config, "gguf", None):
        return ("gguf", "quantize")
    return READS[stage.command]


def _key(stage: Stage, before: list[Stage], keys: dict[str, str]) -> str:
    values = flat_values(stage.config)
    named = ",".join(str(values[name]) for name in PATH_SETTINGS if values.get(name)).split(",")
    inputs = [Path(part.strip().partition("#")[0]).expanduser() for part in named if part]
    upstream = [keys[earlier.label] for earlier in before if earlier.command in _reads(stage)]
    return stage_key(stage.command, {"version": __version__, **values}, [p for p in inputs if p.exists()], upstream)


def _changes(stage: Stage) -> dict[Path, int]:
    """Every file that the stage's command may make, with the time of its last change."""
    values = flat_values(stage.config)
    elsewhere = [Path(values[name]) for name in ("output", "save_dir") if values.get(name)]
    roots = [stage.folder / name for name in OUTPUTS[stage.command]] + elsewhere
    return {path: path.stat().st_ctime_ns for path in files_below(roots) if path.name not in COMMON_FILES}


def _remove_stale(stage: Stage, outdated: dict[str, Any] | None, made: list[Path]) -> None:
    """Delete quantised files of types that the plan no longer asks for: they may come from an older training."""
    if outdated and stage.command == "quantize":
        for path in set(map(Path, outdated["outputs"])) - set(made):
            path.unlink(missing_ok=True)


def _started_anew(stage: Stage) -> Any:
    """With --force a training starts at step 0. Without it a finished one is never deleted because a setting changed:

    it is resumed, and the check of its checkpoint takes what is harmless and refuses the rest by name.
    """
    if stage.command not in TRAINING:
        return stage.config
    return replace(stage.config, run=replace(stage.config.run, resume=None, overwrite=True))
