"""Before a long training trusts this machine's kernels: do they compute what plain torch computes?

Compilers, drivers and torch's own operations differ from machine to machine; an adapter trained on wrong gradients
looks like any other. One layer of the loaded model goes forwards and backwards by the kernels and by their plain twins,
and the whole stack by a CUDA graph and by single launches, for all positions and for some of them: about a second,
apart from compiling what is needed anyway.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.launch import twins_only
from unsloth_factory.model.fast.layer import Row, Saving

LENGTHS = (150, 1, 80)
"""Tokens of the documents: odd, not a multiple of any block, one of a single token."""
SCALE = 1e-3
"""Of the layer's input: norms take it away, so that what the layer adds is not hidden behind what it was given."""
SEED = 2**40 + 5
"""Of LoRA dropout; kernel and twin drop the same numbers."""
LIMIT = 0.05
"""Relative error of a whole tensor. bfloat16 alone makes 0.004 to 0.02, a wrong kernel 0.1 to 1."""
FLOAT8_LIMIT = 0.15
"""The same where products are in float8: what 16 bit rounds otherwise is then rounded to numbers 6 to 12 % apart."""


def problem(decoder: Any) -> str | None:
    """What is wrong with the fast engine on this machine, or None.

    Args:
        decoder: A `FastDecoder` on a GPU whose adapter is bound; its gradients and its plans are left as they were.
    """
    held = [(parameter, parameter.grad) for parameter in (*decoder.parameters(), *decoder.adapter.parameters)]
    kept, forced = decoder.adapter.snapshot(), decoder.planner.forced
    # The least memory that a graph can do with: a card that can train can be checked. Only a last layer that keeps all
    # may be done for some positions alone.
    decoder.planner.forced = [Saving.RECOMPUTE] * (decoder.planner.spec.layers - 1) + [Saving.KEEP]
    try:
        with torch.no_grad():
            return _compared(decoder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler or an operation of another version throws
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
    finally:
        decoder.adapter.restore(kept)
        for parameter, gradient in held:
            parameter.grad = gradient
        if decoder.graphs is not None:
            decoder.graphs.drop()
        decoder.planner.forced = forced
        torch.cuda.empty_cache()


def _compared(decoder: Any) -> str | None:
    limit = FLOAT8_LIMIT if decoder.planner.float8 else LIMIT
    x, dy, row = trial(decoder)
    kernels = one_layer(decoder, x, dy, row)
    with twins_only():
        plain = one_layer(decoder, x, dy, row)
    for name, wanted in plain.items():
        error = error_of(kernels[name], wanted)
        if not error < limit:
            return f"the {name} of a layer is off by {error:.3g} (limit {limit})"
    return None if decoder.graphs is None else _replayed(decoder, x, dy, row, limit)


def trial(decoder: Any) -> tuple[torch.Tensor, torch.Tensor, Row]:
    """(input [T, h] of a layer, gradient at its output, row); the adapter's copies are random till refreshed."""
    device, dtype, hidden = decoder.norm.weight.device, decoder.stack[-1].qkv.dtype, decoder.spec.hidden
    generator = torch.Generator(device).manual_seed(0)
    decoder.refresh_shadows()
    decoder.randomize_shadows(generator)  # B begins at 0, and so would the gradient of A
    x, dy = torch.randn(2, sum(LENGTHS), hidden, generator=generator, device=device).mul_(SCALE).to(dtype)
    cos, sin = decoder.table.of(torch.cat([torch.arange(length, device=device) for length in LENGTHS]))
    seed = torch.full((1,), SEED, dtype=torch.int64, device=device) if decoder.dropout else None
    return x, dy, Row(cos, sin, Documents.of(list(LENGTHS), device), seed=seed)


def _replayed(decoder: Any, x: torch.Tensor, dy: torch.Tensor, row: Row, limit: float) -> str | None:
    launched, _ = decoder.forward_stack(x, row, decoder.planner.plan(len(x)))
    wanted = decoder.final_norm(launched)
    del launched
    index = torch.arange(0, len(x), 3).to(x.device)
    some = torch.zeros_like(dy).index_copy(0, index, dy[index])
    whole, gradients = _both_passes(decoder, x, row, None, some)
    rows, tail_gradients = _both_passes(decoder, x, row, index, dy[index])
    errors = {
        "a CUDA graph's output": error_of(whole, wanted),
        "the output of some positions": error_of(rows, wanted[index]),
    }
    apart = [error_of(one, other) for one, other in zip(tail_gradients, gradients, strict=True)]
    errors["the gradient from some positions"] = max(apart)
    worst = max(errors, key=lambda name: errors[name])
    return None if errors[worst] < limit else f"{worst} is off by {errors[worst]:.3g} (limit {limit})"


def _both_passes(
    decoder: Any, x: torch.Tensor, row: Row, index: torch.Tensor | None, dy: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(hidden states of some positions or all, the gradients in the first and in the last layer) by graphs."""
    with torch.enable_grad():
        hidden = decoder.graphs.run(x, row, index)
        for layer in decoder.stack:
            for projection in layer.projections.values():
                projection.clear_gradients()
        hidden.backward(dy)
    # not those of all layers: with rank 256 they are 3 GB
    ends = [layer.projections.values() for layer in (decoder.stack[0], decoder.stack[-1])]
    return hidden.detach(), [torch.cat([g.flatten() for one in end for g in one.gradients()]) for end in ends]


def one_layer(decoder: Any, x: torch.Tensor, dy: torch.Tensor, row: Row) -> dict[str, torch.Tensor]:
    """Output of the middle layer (or the first that trains), gradient at its input, and of what trains in it."""
    index = max(len(decoder.stack) // 2, decoder.first_trained)
    layer, below = decoder.stack[index], decoder.stack[index - 1].down if index else None
    for projection in layer.projections.values():
        projection.clear_gradients()
    y, saved = layer.forward(x, row, saving=Saving.KEEP)
    room = layer.down.output(len(x))
    layer.down.y_of(room).copy_(dy)
    dx = layer.backward(room, saved, row, below)
    found = {"output": y}
    if dx is not None and below is not None:
        found["input's gradient"] = below.y_of(dx)
    for name, projection in layer.projections.items():
        for number, gradient in enumerate(projection.gradients()):
            found[f"gradient {number} in {name}"] = gradient.clone()
    return found


def error_of(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of one tensor to the other, relative to the other's size; infinite where that is not a number."""
    value = float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf
