"""Time of a micro-batch from the cost of its operations: the card works while Python hands it the next kernels.

Whichever is slower decides, phase by phase; where both take about the same time they hinder each other. `Host` and the
shares below were fitted on one machine with an H200 (benchmarks/plan_accuracy.py, 2026-11-22: c1 to c8 for the card,
these and v01 to v12 for Python); elsewhere they are a model. Its Python was unsteady: steps of the same run differed by
half where it set the pace, and timing a small stack of layers beforehand (14 to 24 ms, the same machine) told nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from unsloth_factory.estimate.layers import Rows
from unsloth_factory.estimate.memory import Training, micro_batch_cost
from unsloth_factory.estimate.rehearsal import Work
from unsloth_factory.model.gpus import Gpu

ELEMENTWISE = 0.6
"""Share of a large copy's bandwidth that the small kernels of norms, rotations and activations reach."""
KERNEL_SECONDS = 4e-6
"""Start and end of a kernel on the card."""
CAUSAL_SHARE = {"forward": 0.6, "backward": 0.45}
"""Attention without a mask: share of the rate of matrix products, over half of the square."""
MASKED_SHARE = {"forward": 0.39, "backward": 0.35}
"""With a dense mask, over the whole square."""
OVERLAP = 6.0
"""Exponent of the smooth maximum of card and Python. The plain maximum was 5 to 22 % too fast where both were close."""


@dataclass(frozen=True)
class Host:
    """Seconds that Python and torch take to hand over one kernel, by phase."""

    forward: float = 42e-6
    recompute: float = 100e-6
    """A checkpointed layer's second forward pass, with the hooks of both passes."""
    backward: float = 42e-6
    tensor: float = 15e-6
    """An 8-bit optimizer's update of one parameter."""


@dataclass(frozen=True)
class Speed:
    """Seconds of one micro-batch, and what the card and Python would take of it alone."""

    seconds: float
    card: float
    host: float

    @property
    def host_bound(self) -> bool:
        """Python, not the card, sets the pace."""
        return self.host > self.card


def micro_batch_speed(work: dict[str, Work], gpu: Gpu, host: Host, masked: bool) -> Speed:
    """Time of a micro-batch whose operations cost `work`. The card's rates must be known."""
    stages = (("reference",), ("forward",), ("recompute", "backward"))
    seconds = card = python = 0.0
    for stage in stages:
        parts = [(name, work[name]) for name in stage if name in work]
        on_card = sum(card_seconds(part, gpu, name, masked) for name, part in parts)
        in_python = sum(part.kernels * _host_rate(host, name) for name, part in parts)
        seconds += (on_card**OVERLAP + in_python**OVERLAP) ** (1 / OVERLAP)
        card += on_card
        python += in_python
    return Speed(seconds, card, python)


def _host_rate(host: Host, phase: str) -> float:
    return {"backward": host.backward, "recompute": host.recompute}.get(phase, host.forward)


def card_seconds(work: Work, gpu: Gpu, phase: str, masked: bool) -> float:
    """Time of a phase on the card alone."""
    assert gpu.products is not None
    assert gpu.bandwidth is not None
    share = (MASKED_SHARE if masked else CAUSAL_SHARE)["backward" if phase == "backward" else "forward"]
    return (
        work.kernels * KERNEL_SECONDS
        + work.moved / (ELEMENTWISE * gpu.bandwidth)
        + work.dense / gpu.products
        + work.attention / (share * gpu.products)
    )


def update_seconds(training: Training, gpu: Gpu, host: Host) -> float:
    """Clipping and the optimizer's update, once a step."""
    assert gpu.bandwidth is not None
    parameters = training.trained_parameters()
    width = 4 if training.optimizer == "adamw" else 1
    # gradient read three times and written once; weight and two moments read and written
    moved = sum(parameters.values()) * (16 + 8 + 4 * width)
    calls = 0 if training.optimizer == "adamw" else len(parameters)
    return moved / gpu.bandwidth + calls * host.tensor + 5e-3


class Pace:
    """Seconds of a micro-batch for any number of tokens: a few are rehearsed, the others lie between."""

    def __init__(self, training: Training, gpu: Gpu, host: Host, batches: Sequence[Rows]) -> None:
        self.training, self.gpu, self.host = training, gpu, host
        sizes = sorted(batches, key=lambda rows: rows.count)
        marks = [sizes[mark] for mark in (0, len(sizes) // 2, -1)]
        self.points = [(rows.count, self._speed(rows)) for rows in dict.fromkeys(marks)]

    def _speed(self, rows: Rows) -> Speed:
        return micro_batch_speed(micro_batch_cost(self.training, rows), self.gpu, self.host, rows.masked)

    @property
    def typical(self) -> Speed:
        """Of the middle micro-batch."""
        return self.points[len(self.points) // 2][1]

    def seconds(self, count: int) -> float:
        """Time of a micro-batch of `count` rows."""
        below = [point for point in self.points if point[0] <= count] or self.points[:1]
        above = [point for point in self.points if point[0] >= count] or self.points[-1:]
        (x0, y0), (x1, y1) = below[-1], above[0]
        share = (count - x0) / (x1 - x0) if x1 > x0 else 0.0
        return y0.seconds + share * (y1.seconds - y0.seconds)
