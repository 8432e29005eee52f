"""Full and freeze fine-tuning: the weights themselves train, in float32, all of them or those of the last layers.

Matrices train in place, as parts of the fused ones that the layers compute with; their gradients add up in float32, by
the same products as those of LoRA. Not recorded as CUDA graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from unsloth_factory.model.fast.decoder import FastDecoder


class TrainedWeights:
    """Takes the place of `flat.FlatAdapter` where weights of their own train instead of LoRA matrices."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def prepare(self) -> None:
        """Before a backward pass: what gradients hold is kept, and what they do not hold begins at 0."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def snapshot(self) -> list[torch.Tensor]:
        """A copy of all gradients added up so far."""
        self.prepare()
        return [parameter.grad.clone() for parameter in self.parameters if parameter.grad is not None]

    def restore(self, kept: list[torch.Tensor]) -> None:
        """Go back to a snapshot."""
        for parameter, old in zip(self.parameters, kept, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(old)


def train_all(model: Any, dtype: torch.dtype) -> None:
    """Let every parameter of a `load_fast` model train, in float32; it computes in `dtype`."""
    decoder = model.model
    _train_layers(decoder, 0, dtype)
    for module in (decoder.embed_tokens, decoder.norm, model.lm_head):
        _train(module)
    _take_over(decoder, model)


def train_last_layers(model: Any, last_n: int, dtype: torch.dtype) -> None:
    """Let the last `last_n` layers train, in float32; embeddings, final norm and head stay frozen."""
    decoder = model.model
    _train_layers(decoder, len(decoder.stack) - last_n, dtype)
    _take_over(decoder, model)


def _train_layers(decoder: FastDecoder, first: int, dtype: torch.dtype) -> None:
    decoder.first_trained = first
    decoder.planner.spec = replace(decoder.spec, layers=len(decoder.stack) - first)
    for names, layer in zip(decoder.layers[first:], decoder.stack[first:], strict=True):
        for fused in layer.projections.values():
            for one in fused.train(dtype):
                module = names.get_submodule(one.part.name)
                module.weight = one.weight
                if one.bias is not None:
                    module.bias = one.bias
        for module in names.modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter):
                _train(module)


def _train(module: Any) -> None:
    module.weight.data = module.weight.data.float()
    module.weight.requires_grad_(True)


def _take_over(decoder: FastDecoder, model: Any) -> None:
    decoder.adapter = TrainedWeights([parameter for parameter in model.parameters() if parameter.requires_grad])
