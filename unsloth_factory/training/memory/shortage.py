"""Memory that ran out: how it is recognised, and how what the failed attempt held is given back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
SIGNS = (
    "out of memory",  # CUDA's own words, where no allocator of torch asked
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",  # the same on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",  # a handle is made at first use, and needs memory for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "HOST_ALLOCATION_FAILED",
    "DEVICE_ALLOCATION_FAILED",
)
"""What a RuntimeError says when it means memory."""


@dataclass(frozen=True)
class Shortage:
    """An attempt that ended for want of memory."""

    message: str
    """First line of the error."""


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that the memory of the GPU or of this machine ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def attempt(work: Callable[[], T], release: Callable[[], None]) -> T | Shortage:
    """Do some work; when the memory runs out, free all that it held and say so.

    Args:
        work: What is tried. What it changed before it failed is its caller's business.
        release: Gives memory back that nobody uses (`Meter.release`).
    """
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_shortage(error):
            raise
        shortage = Shortage(str(error).partition("\n")[0])
    # Only here, outside the handler, is the traceback gone, and with it the frames that hold the tensors.
    _empty_backward_queue()
    release()
    return shortage


def _empty_backward_queue() -> None:
    """Let autograd drop the graph of a backward pass that failed.

    The queue of this thread keeps what was still to be done, and with it all activations, until the next backward pass.
    """
    with contextlib.suppress(RuntimeError), torch.enable_grad():
        torch.zeros(1, requires_grad=True).mul(1).backward()


def insist(work: Callable[[], T], release: Callable[[], None], times: int = 3) -> T:
    """Do some work that needs little memory and can be repeated as a whole; the last attempt may fail.

    Raises:
        RuntimeError: The error of the last attempt.
    """
    for _ in range(times - 1):
        outcome = attempt(work, release)
        if not isinstance(outcome, Shortage):
            return outcome
        time.sleep(0.05)  # another process of the card may be about to give back
    return work()
