"""`uf plan`: does a training fit, how fast is it, how long does it take, and which settings are best?

Nothing is loaded: sizes come from config.json, lengths from the dataset if one is given.
"""

from __future__ import annotations

import json
import shlex
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from rich.console import Console

from unsloth_factory.commands.planning.data import workload_of
from unsloth_factory.commands.planning.page import print_page
from unsloth_factory.config.commands import DpoConfig, PlanConfig, SftConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.fields import settings_of
from unsloth_factory.config.parse import flat_values
from unsloth_factory.estimate.fast_engine import why_not_fast
from unsloth_factory.estimate.forecast import (
    Choice,
    Forecast,
    Forecaster,
    best,
    changes,
    first_that_fits,
    larger,
    longest_that_fits,
)
from unsloth_factory.estimate.memory import Training
from unsloth_factory.model.gpus import Gpu, find_gpu, present_gpu
from unsloth_factory.model.shapes import ModelShape, find_config, read_shape

LONGEST_TRIED = 32_768


@dataclass(frozen=True)
class Plan:
    """Everything that `uf plan` found out."""

    config: PlanConfig
    model: ModelShape
    engine: str
    """That --engine auto would take, or that was asked for."""
    gpu: Gpu
    asked: Forecast
    """With the settings as given."""
    advised: Forecast | None
    """The fastest that fits; None where nothing fits."""
    changes: tuple[str, ...]
    """What it changes."""
    same_result: bool
    """It computes the same; otherwise something had to be given up."""
    options: tuple[tuple[str, Forecast], ...]
    """The next larger settings after the advised ones."""
    longest: int | None
    """Longest samples that the advised settings can take; None where the data says how long they are."""
    instead: Plan | None
    """The same with QLoRA, where full or freeze training fits in no way."""
    samples: int
    assumed: bool
    """No dataset was given: 1,000 samples of --max_seq_length tokens."""

    @property
    def command(self) -> str | None:
        """The command line of the advised settings."""
        return None if self.advised is None else command_line(self.config, self.advised.choice)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; sizes in bytes, times in seconds."""
        return {
            **_figures(self.asked),
            "parts": self.asked.memory.parts,
            "slack": self.asked.memory.slack,
            "allocated": self.asked.memory.allocated,
            "context": self.gpu.context,
            "engine": self.engine,
            "gpu": asdict(self.gpu),
            "parameters": self.model.parameters(),
            "trained_parameters": self.asked.memory.trained,
            "samples": self.samples,
            "assumed_data": self.assumed,
            "advised": None if self.advised is None else _figures(self.advised),
            "changes": list(self.changes),
            "same_result": self.same_result,
            "options": [{"change": what, **_figures(forecast)} for what, forecast in self.options],
            "longest": self.longest,
            "instead": None if self.instead is None else self.instead.to_dict(),
            "command": self.command,
        }


def run(config: PlanConfig) -> int:
    """`uf plan`; exit code 1 when the settings as given do not fit."""
    console = Console()
    with console.status("planning") if console.is_terminal and not config.json else nullcontext():
        plan = make_plan(config)
    if config.json:
        print(json.dumps(plan.to_dict(), indent=1))
    else:
        print_page(console, plan)
    return 0 if plan.asked.fits else 1


def make_plan(config: PlanConfig) -> Plan:
    """Work out a plan; for notebooks too.

    Raises:
        UserError: The model, the data or the card cannot be planned with.
    """
    forecaster = forecaster_of(config)
    choice = choice_of(config, forecaster.training)
    asked = forecaster.forecast(choice)
    same = best(forecaster, choice)
    advised = same or first_that_fits(forecaster, choice)
    around = advised.choice if advised else choice
    workload = forecaster.workload
    return Plan(
        config=config,
        model=forecaster.training.shape,
        engine=forecaster.training.engine,
        gpu=forecaster.gpu,
        asked=asked,
        advised=advised,
        changes=tuple(changes(choice, advised.choice)) if advised else (),
        same_result=same is not None,
        options=tuple(larger(forecaster, around)),
        longest=_longest(forecaster, around) if workload.assumed and advised else None,
        instead=_with_qlora(config) if advised is None and config.tuning.finetuning_type != "lora" else None,
        samples=len(workload.samples),
        assumed=workload.assumed,
    )


def _with_qlora(config: PlanConfig) -> Plan | None:
    plan = make_plan(replace(config, tuning=replace(config.tuning, finetuning_type="lora", no_quantization=False)))
    return plan if plan.advised else None


def forecaster_of(config: PlanConfig) -> Forecaster:
    """What answers for any choice of settings.

    Raises:
        UserError: The model, the data or the card cannot be planned with.
    """
    _check(config)
    path = find_config(config.model.model, config.model.hub)
    shape = read_shape(path)
    gpu = _gpu(config.gpu)
    if config.model.max_memory is not None:
        gpu = replace(gpu, memory=min(gpu.memory, config.model.max_memory + gpu.context))
    return Forecaster(_training(config, shape, gpu), workload_of(config, path), gpu)


def choice_of(config: PlanConfig, training: Training) -> Choice:
    """The settings as given."""
    return Choice(
        batch_size=config.loop.batch_size,
        accumulation_steps=config.loop.accumulation_steps,
        checkpointing=not config.loop.no_gradient_checkpointing,
        quantized=training.quantized,
        optimizer=config.loop.optimizer,
        max_seq_length=config.data.max_seq_length,
    )


def _check(config: PlanConfig) -> None:
    if config.method == "grpo":
        raise UsageError(
            "--method grpo: this version cannot train it, so that there is nothing to plan. Use sft or dpo."
        )
    if config.method == "dpo" and config.tuning.finetuning_type != "lora":
        raise UsageError(f"--method dpo --finetuning_type {config.tuning.finetuning_type}: dpo trains LoRA alone.")
    if config.model.engine == "unsloth":
        raise UsageError("--engine unsloth: not in this version. Use standard, fast or auto.")


def _gpu(name: str) -> Gpu:
    if name.lower() != "auto":
        return find_gpu(name)
    found = present_gpu()
    if found is None:
        raise UsageError("--gpu auto: no CUDA GPU here. Name one, such as --gpu T4, or its memory: --gpu 16GB.")
    return found


def _training(config: PlanConfig, shape: ModelShape, gpu: Gpu) -> Training:
    tuning = config.tuning
    if shape.prequantized and tuning.finetuning_type != "lora":
        raise UserError(
            f"--finetuning_type {tuning.finetuning_type} with 4-bit weights ({config.model.model}): they cannot train "
            "themselves. Use --finetuning_type lora, or an unquantised base."
        )
    if tuning.finetuning_type == "freeze" and tuning.freeze_last_n > shape.layers:
        raise UserError(f"--freeze_last_n {tuning.freeze_last_n}: the model has {shape.layers} layers.")
    wanted = tuning.quantization_bit == 4 or (tuning.finetuning_type == "lora" and not tuning.no_quantization)
    training = Training(
        shape=shape,
        kind=tuning.finetuning_type,
        quantized=wanted or shape.prequantized,
        lora_rank=tuning.lora_r,
        lora_target=tuning.lora_target,
        lora_dropout=tuning.lora_dropout > 0,
        freeze_last_n=tuning.freeze_last_n,
        method="dpo" if config.method == "dpo" else "sft",
        capability=gpu.capability,
        low_memory=config.model.low_memory,
    )
    if config.model.matmul != "exact":
        raise UsageError(f"--matmul {config.model.matmul} is not planned yet: it was not measured. Leave it out.")
    if config.model.engine == "standard":
        return training
    reason = why_not_fast(training)
    if reason is not None and config.model.engine == "fast":
        raise UsageError(f"--engine fast with {reason} is not planned yet: it was not measured. Use --engine standard.")
    return replace(training, engine="fast" if reason is None else "standard")


def _longest(forecaster: Forecaster, choice: Choice) -> int | None:
    limit = min(LONGEST_TRIED, forecaster.training.shape.max_positions)
    return longest_that_fits(forecaster, choice, limit)


# -- command line -----------------------------------------------------------------------------------------------------


def training_config(config: PlanConfig) -> SftConfig:
    """The settings that `uf sft` or `uf dpo` would get."""
    kind = DpoConfig if config.method == "dpo" else SftConfig
    return kind(**{part.name: getattr(config, part.name) for part in fields(kind)})


def command_line(config: PlanConfig, choice: Choice) -> str:
    """The command that trains with these settings; what has its default value is left out."""
    tuning = config.tuning
    if tuning.finetuning_type == "lora":
        tuning = replace(tuning, quantization_bit=4 if choice.quantized else None, no_quantization=not choice.quantized)
    chosen = replace(
        config,
        data=replace(config.data, max_seq_length=choice.max_seq_length),
        tuning=tuning,
        loop=replace(
            config.loop,
            batch_size=choice.batch_size,
            accumulation_steps=choice.accumulation_steps,
            no_gradient_checkpointing=not choice.checkpointing,
            optimizer=choice.optimizer,
        ),
    )
    command = training_config(chosen)
    words = ["uf", config.method]
    table = settings_of(type(command))
    always = {"model", "dataset", "max_seq_length", "batch_size", "accumulation_steps"}
    for name, value in flat_values(command).items():
        if name == "dataset" and value is None:
            value = "DATA.jsonl"
        if value != table[name].default or (name in always and value is not None):
            words += [f"--{name}", *_text(value)]
    return shlex.join(words)


def _text(value: Any) -> list[str]:
    if value is True:
        return []
    if isinstance(value, dict):
        return [",".join(f"{key}={item}" for key, item in value.items())]
    return [f"{value:g}" if isinstance(value, float) else str(value)]


def _figures(forecast: Forecast) -> dict[str, Any]:
    return {
        "verdict": forecast.verdict,
        "reserved": forecast.memory.reserved,
        "tokens_per_second": forecast.tokens_per_second,
        "steps": forecast.steps,
        "seconds": forecast.seconds,
        "longest_micro_batch": forecast.longest,
        "host_bound": forecast.host_bound,
        "pinned": forecast.pinned,
        "settings": asdict(forecast.choice),
    }
