"""From the CPU's memory to the GPU without waiting for it."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device, made in the order of its work, for which Python does not wait.

    A copy out of pageable memory first waits until the device has done all that it was given (CUDA's rules of
    synchronisation), so that it stood idle at the start of each micro-batch. Pinned memory comes out of torch's cache,
    which knows when a copy is done.
    """
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
