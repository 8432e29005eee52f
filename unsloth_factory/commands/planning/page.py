"""The page that `uf plan` prints: verdict, memory by part, what is next larger, command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unsloth_factory.estimate.forecast import Forecast
from unsloth_factory.training.reporting.progress import duration

if TYPE_CHECKING:
    from unsloth_factory.commands.plan import Plan

GIB = 2**30
STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}
BAR = 24
NAMES = {
    "base weights": "base weights, frozen",
    "quantisation state": "scales of the 4-bit weights",
    "trained weights": "trained weights, float32",
    "activations": "activations kept for the backward pass",
    "temporaries": "temporaries of one layer",
    "logits": "logits, one chunk",
    "workspace": "unpacked weights, kernels' workspace",
}


def print_page(console: Console, plan: Plan) -> None:
    """Print a plan."""
    _print_verdict(console, plan)
    console.print()
    _print_parts(console, plan)
    if plan.options:
        console.print()
        _print_choices(console, plan)
    console.print()
    _print_advice(console, plan)


def _print_verdict(console: Console, plan: Plan) -> None:
    asked, gpu = plan.asked, plan.gpu
    needed = asked.memory.reserved + gpu.context
    line = Text.assemble(
        (f"{asked.verdict}: {_gib(needed)} of {_gib(gpu.memory)} GiB", STYLES[asked.verdict]), f" on {gpu.name}"
    )
    if asked.verdict == "tight":
        line.append(" (predictions can be 4 % off)")
    console.print(line, highlight=False)
    console.print(_work_line(plan), highlight=False)
    console.print(_pace_line(plan), highlight=False)
    if plan.engine == "fast":
        console.print(
            "Engine fast: activations fill the memory that there is; with less of it, layers recompute more",
            highlight=False,
        )
    if asked.pinned:
        console.print(
            f"The longest micro-batch leaves layer inputs in the CPU's memory: {_gib(asked.pinned)} GiB, which must be "
            "no more than three quarters of what is free there",
            highlight=False,
        )


def _work_line(plan: Plan) -> str:
    config, model, asked = plan.config, plan.model, plan.asked
    kind = f"{config.tuning.finetuning_type} fine-tuning"
    if config.tuning.finetuning_type == "lora":
        kind = "QLoRA" if asked.choice.quantized else "LoRA"
    choice = asked.choice
    work = f"{config.method}, {kind}: {_count(asked.memory.trained)} of {_count(model.total)} parameters, "
    if plan.engine == "fast":
        samples = choice.batch_size * choice.accumulation_steps
        return f"{work}steps of {samples} samples in micro-batches of up to {asked.longest:,} tokens"
    return (
        f"{work}micro-batches of {choice.batch_size} x {choice.accumulation_steps}, longest {asked.longest:,} tokens"
        + (", gradient checkpointing" if choice.checkpointing else "")
    )


def _pace_line(plan: Plan) -> str:
    asked = plan.asked
    if asked.seconds is None or asked.tokens_per_second is None:
        return f"{asked.steps:,} steps; the speed of a card known by its memory alone cannot be told"
    line = f"{asked.tokens_per_second:,.0f} tokens/s, {asked.steps:,} steps, {duration(asked.seconds)}"
    if plan.assumed and plan.config.loop.max_steps is None:
        line += f" for {plan.samples:,} samples (assumed: no --dataset)"
    # Measured for one configuration on three machines with the same GPU: 1,947, 3,036 and 3,857 tokens/s.
    line += "; Python sets the pace, not the card: half or twice that on another host" if asked.host_bound else ""
    if not plan.gpu.measured:
        line += f". A model: the {plan.gpu.name} was never measured"
    return line


def _print_parts(console: Console, plan: Plan) -> None:
    """Parts of the fullest moment, the lasting ones first, with their running sum."""
    memory, gpu = plan.asked.memory, plan.gpu
    rows = [(NAMES.get(part, part), size) for part, size in memory.parts.items() if size >= 2**20]
    rows += [("rounding and gaps of the allocator", memory.slack), ("CUDA context (outside torch)", gpu.context)]
    table = Table(box=None, pad_edge=False)
    table.add_column("memory at its fullest")
    for name in ("GiB", "sum"):
        table.add_column(name, justify="right")
    table.add_column("")
    whole = max(gpu.memory, memory.reserved + gpu.context)
    total = 0
    for name, size in rows:
        before, total = total, total + size
        filled = round(BAR * total / whole) - round(BAR * before / whole)
        style = "red" if total > gpu.memory else "cyan"
        bar = Text(" " * round(BAR * before / whole) + "\u2588" * filled, style=style)
        table.add_row(name, f"{size / GIB:.2f}", f"{total / GIB:.2f}", bar)
    console.print(table)


def _print_choices(console: Console, plan: Plan) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("settings", overflow="fold")
    for name in ("GiB", "tokens/s", "time"):
        table.add_column(name, justify="right")
    table.add_column("")
    rows = [("as given", plan.asked)]
    if plan.advised is not None and plan.advised.choice != plan.asked.choice:
        rows.append(("advised: " + ", ".join(plan.changes), plan.advised))
    prefix = "then " if len(rows) > 1 else ""
    rows += [(prefix + what, forecast) for what, forecast in plan.options]
    for what, forecast in rows:
        table.add_row(what, *_cells(forecast, plan), Text(forecast.verdict, STYLES[forecast.verdict]))
    console.print(table)


def _cells(forecast: Forecast, plan: Plan) -> tuple[str, str, str]:
    speed = forecast.tokens_per_second
    return (
        f"{(forecast.memory.reserved + plan.gpu.context) / GIB:.1f}",
        "?" if speed is None else f"{speed:,.0f}",
        "?" if forecast.seconds is None else duration(forecast.seconds),
    )


def _print_advice(console: Console, plan: Plan) -> None:
    if plan.advised is None or plan.command is None:
        _print_nothing_fits(console, plan)
        return
    if plan.longest is not None and plan.longest > plan.advised.choice.max_seq_length:
        console.print(f"Samples of up to {plan.longest:,} tokens would fit (--max_seq_length).", highlight=False)
    if plan.advised.choice == plan.asked.choice:
        console.print("Nothing that fits and computes the same is clearly faster:", highlight=False)
    elif not plan.same_result:
        console.print("What fits, with the same samples in a step:", highlight=False)
    else:
        console.print("The fastest that fits, with the same samples in a step:", highlight=False)
    _print_command(console, plan.command)


def _print_nothing_fits(console: Console, plan: Plan) -> None:
    smaller = ["recomputing every layer"] if plan.engine == "fast" else ["micro-batches of 1", "checkpointing"]
    tried = [*smaller, "an 8-bit optimizer", "samples of 128 tokens"]
    tried += ["4-bit base weights"] if plan.config.tuning.finetuning_type == "lora" else []
    line = f"Nothing fits on {plan.gpu.name}; tried: {', '.join(tried)}."
    if plan.instead is None or plan.instead.advised is None or plan.instead.command is None:
        console.print(line + " Use a smaller model or a larger card.", highlight=False)
        return
    needed = plan.instead.advised.memory.reserved + plan.gpu.context
    console.print(f"{line} QLoRA does, in {_gib(needed)} GiB:", highlight=False)
    _print_command(console, plan.instead.command)


def _print_command(console: Console, command: str) -> None:
    console.print(command, highlight=False, soft_wrap=True, style="bold", markup=False)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.1f} M"
