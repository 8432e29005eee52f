"""training_loss.png: the curves of one run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.run.atomic import write_bytes


def plot_loss(lines: Sequence[dict[str, Any]], path: Path, title: str) -> Path:
    """Draw loss, smoothed loss, evaluation and general loss, and learning rate over the steps; written atomically.

    Args:
        lines: Lines of metrics.jsonl; steps whose loss is null (skipped) are left out.
        path: The PNG file.
        title: Heading of the figure.
    """
    # The object interface, not pyplot: no global state, and no display is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5))
    figure.subplots_adjust(left=0.08, right=0.91, top=0.92, bottom=0.11)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [line["step"] for line in lines if line["loss"] is not None]
    losses = [line["loss"] for line in lines if line["loss"] is not None]
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="training loss, smoothed")
    evaluated = [(line["step"], line["eval_loss"]) for line in lines if line.get("eval_loss") is not None]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "o-", color="tab:orange", label="evaluation loss")
    general = [(line["step"], line["general_loss"]) for line in lines if line.get("general_loss") is not None]
    if general:
        starts = [line["general_loss_start"] for line in lines if line.get("general_loss_start") is not None]
        general = [(0, start) for start in starts[:1]] + general
        axes.plot(*zip(*general, strict=True), "s--", color="tab:green", markersize=4, label="general loss")
    # matplotlib's own font has no Chinese: a title of empty boxes says less than none
    axes.set(title=title if title.isascii() else "", xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    rate_axes = axes.twinx()
    rate_axes.plot(
        [line["step"] for line in lines],
        [line["lr"] for line in lines],
        color="tab:gray",
        linestyle=":",
        label="learning rate",
    )
    rate_axes.set_ylabel("learning rate")
    rate_axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    handles = axes.get_legend_handles_labels()[0] + rate_axes.get_legend_handles_labels()[0]
    axes.legend(handles=handles, loc="upper right")
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return write_bytes(path, buffer.getvalue())


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, corrected for its start (as Adam corrects its moments)."""
    average, result = 0.0, []
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**count))
    return result
