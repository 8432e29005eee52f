"""How long micro-batches take by the number of their tokens, measured on the GPU that trains.

Matrix units compute in tiles, a wave of them at a time, so the time of a product grows in steps: on an H200 2,176
tokens of Qwen3-8B took 17 % longer than 2,048, the next 384 together 13 %. Which sizes are good depends on the shapes
of the model, the GPU and the library's choice of tiles, so it is measured: a layer's products and the dequantisation of
their weights; what else a layer computes grows with the tokens and changes no comparison.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from unsloth_factory.model.fast.layer import Layer
from unsloth_factory.model.fast.planner import STEP

REPEATS = 5
"""Of each size; the quickest counts."""
BETWEEN_MS = 3.0
"""What a micro-batch takes whatever its size: pauses between graphs, its share of an update."""
HEAD_START = 2_000_000
"""Cycles, 1 ms, that the GPU sleeps before: what is measured must not wait for Python."""


@torch.no_grad()
def measure(layer: Layer, most: int) -> list[float]:
    """Milliseconds a layer of the products, forwards and backwards, for `STEP`, 2 `STEP`, ... up to `most` tokens.

    Args:
        layer: One of them, on a GPU. Its gradients stay as they are.
        most: Tokens, a multiple of `STEP`.
    """
    between = BETWEEN_MS / layer.spec.layers
    # The largest first: what it leaves in torch's cache has room for all others. The smallest first, memory was left
    # behind for every size: 13.50 GiB instead of 12.43 of a 1.7B model and 8,192 tokens. And in rounds: a clock that
    # rises or falls meanwhile then makes no size look better than another.
    sizes = range(most, 0, -STEP)
    rounds = [[_milliseconds(layer, tokens) for tokens in sizes] for _ in range(REPEATS + 1)]
    quickest = [min(taken) for taken in zip(*rounds[1:], strict=True)]  # the first sets the library up
    return [round(between + taken, 4) for taken in reversed(quickest)]


def cost(costs: Sequence[float], tokens: int) -> float:
    """What a micro-batch of so many tokens takes, by what `measure` gave; beyond it 0: such a size has no choice."""
    index = -(-tokens // STEP) - 1
    return costs[index] if index < len(costs) else 0.0


def _milliseconds(layer: Layer, tokens: int) -> float:
    projections = layer.projections.values()
    noise = torch.Generator(layer.qkv.device).manual_seed(0)  # the run's own random numbers stay as they are
    rooms = [
        (one, one.input(tokens).normal_(generator=noise), one.output(tokens).normal_(generator=noise))
        for one in projections
    ]
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    start.record()
    for projection, x, dy in rooms:
        projection.forward(x)
        projection.input_gradient(dy)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)
