"""The embedding in the CPU's memory: 1.2 GB of the GPU's for Qwen3-8B, at the price of a few rows copied each time."""

from __future__ import annotations

import torch
from torch import nn

from unsloth_factory.kernels.transfer import to_device


class HostEmbedding(nn.Module):
    """A frozen embedding whose table stays on the CPU.

    Args:
        weight: [V, h] on the CPU.
        device: Where the rows are wanted.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.device = device

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., h] on the device, of ids on either."""
        rows = nn.functional.embedding(ids.to("cpu"), self.weight)
        return to_device(rows, self.device)

    def _apply(self, fn: object, recurse: bool = True) -> HostEmbedding:
        """Stay where it is when the model is moved."""
        return self
