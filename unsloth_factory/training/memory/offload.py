"""Activations wait in the CPU's memory for the backward pass.

With recomputed layers these are the layer inputs: tokens x hidden size x 2 bytes a layer, 8 KB a token and layer for
hidden size 4,096. They go out and come back in the same stream, so no value is read before it is there.
"""

from __future__ import annotations

from typing import Any

import torch

from unsloth_factory.model.loaded import LoadedModel

SMALLEST = 2**20
"""Bytes below which a tensor stays: the copies would cost more than they free."""


def offloaded(loaded: LoadedModel, smallest: int | None = None) -> torch.autograd.graph.saved_tensors_hooks:
    """A context for a forward pass: what it saves for the backward pass, weights apart, is kept in the CPU's memory.

    Values, dtypes and strides come back as they were, so gradients are bit-identical. Tensors of fewer bytes than
    `smallest` (`SMALLEST`) stay where they are.
    """
    least = SMALLEST if smallest is None else smallest
    weights = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in loaded.model.buffers()}

    def pack(tensor: torch.Tensor) -> Any:
        stays = tensor.nbytes < least or tensor.untyped_storage().data_ptr() in weights
        return tensor if stays else (tensor.device, _to_host(tensor))

    def unpack(packed: Any) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        device, tensor = packed
        return tensor.to(device, non_blocking=tensor.is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU with the same strides, in pinned memory if it is given: then it is copied at full speed."""
    pinned = tensor.device.type == "cuda"
    try:
        host = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    except RuntimeError:
        if not pinned:
            raise
        host, pinned = torch.empty_like(tensor, device="cpu"), False  # the limit of locked memory, or no room for it
    return host.copy_(tensor, non_blocking=pinned)
