"""Which parameters train with --finetuning_type full and freeze, and in which number format.

Trained parameters are float32 on every device. In bfloat16 two neighbouring numbers differ by 0.4-0.8 %, so an update
of 1e-5 rounds back to the old weight and nothing is learned; the matrix products still run in 16 bit (autocast).
Memory of a trained parameter: 4 bytes, + 4 for its gradient, + 8 for AdamW's state (2 with an 8-bit optimizer).
"""

from __future__ import annotations

import re

from torch import nn

from unsloth_factory.config.errors import UserError

LAYER_INDEX = re.compile(r"(?:^|\.)layers\.(\d+)\.")


def train_all(model: nn.Module) -> None:
    """Let every parameter train, in float32."""
    model.float().requires_grad_(True)


def train_last_layers(model: nn.Module, last_n: int) -> list[str]:
    """Let only the last `last_n` decoder layers train, in float32; embeddings, final norm and head stay frozen.

    Returns:
        Names of the trained parameters.

    Raises:
        UserError: The model has fewer layers.
    """
    indices = {name: _layer_index(name) for name, _ in model.named_parameters()}
    count = 1 + max((index for index in indices.values() if index is not None), default=-1)
    check_layers(last_n, count)
    model.requires_grad_(False)
    trained = []
    for name, parameter in model.named_parameters():
        index = indices[name]
        if index is not None and index >= count - last_n:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
            trained.append(name)
    return trained


def check_layers(last_n: int, count: int) -> None:
    """Refuse to train more layers than a model has.

    Raises:
        UserError: It has fewer.
    """
    if last_n > count:
        raise UserError(f"--freeze_last_n {last_n}: the model has {count} layers. Give at most {count}.")


def _layer_index(name: str) -> int | None:
    match = LAYER_INDEX.search(name)
    return int(match.group(1)) if match else None
