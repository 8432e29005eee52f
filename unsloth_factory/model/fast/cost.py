"""What products in float8 cost in exactness, found on the loaded model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsloth_factory.model.fast.self_check import error_of, one_layer, trial


@dataclass(frozen=True)
class Cost:
    """Relative errors of one layer by float8 against the same layer in the computation dtype."""

    output: float
    """Of what the layer adds to its input."""
    gradient: float
    """The largest, of the gradient at the layer's input and of the LoRA matrices'."""


@torch.no_grad()
def of_float8(decoder: Any) -> Cost:
    """Measure a `FastDecoder` whose middle layer computes in float8; it is left as it was."""
    kept = decoder.adapter.snapshot()
    x, dy, row = trial(decoder)
    rounded = one_layer(decoder, x, dy, row)
    projections = decoder.stack[max(len(decoder.stack) // 2, decoder.first_trained)].projections.values()
    float8 = [projection.float8 for projection in projections]
    for projection in projections:
        projection.float8 = None
    exact = one_layer(decoder, x, dy, row)
    for projection, own in zip(projections, float8, strict=True):
        projection.float8 = own
    decoder.adapter.restore(kept)
    errors = {name: error_of(rounded[name], wanted) for name, wanted in exact.items()}
    return Cost(output=errors.pop("output"), gradient=max(errors.values(), default=0.0))


def in_words(cost: Cost) -> str:
    """For the line that names the engine."""
    return (
        f"its products in fp8 are not exact: a layer's output is off by {100 * cost.output:.1f} %, its gradients by up "
        f"to {100 * cost.gradient:.1f} %"
    )
