"""Triton where it is installed; modules of this folder import it from here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_triton: Any = None
tl: Any = None
try:
    import triton as _triton  # type: ignore[no-redef]
    import triton.language as tl  # type: ignore[no-redef]
except ImportError:  # a machine without a GPU needs none
    pass


__all__ = ["jit", "power_of_two", "runs_kernels", "runs_triton", "tl", "twins_only", "warps_for"]
_only_twins: list[bool] = []
"""Not empty within `twins_only`."""


@contextmanager
def twins_only() -> Iterator[None]:
    """On a GPU too everything is computed by the plain twins of the kernels."""
    _only_twins.append(True)
    try:
        yield
    finally:
        _only_twins.pop()


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels made for GPUs are used on this device."""
    return device.type == "cuda" and not _only_twins


def jit(function: Callable[..., None]) -> Any:
    """`triton.jit`, or the function as it is where Triton is missing (it is then never called)."""
    return function if _triton is None else _triton.jit(function)


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether the kernels take this tensor, rather than their twins."""
    return runs_kernels(tensor.device) and _triton is not None


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << max(0, number - 1).bit_length()


def warps_for(block: int) -> int:
    """Warps of a program that handles `block` elements of a row at once."""
    return min(16, max(1, block // 256))
