"""The optimizer's update: all of it or nothing, although memory may run out half-way.

torch's and bitsandbytes' CPU kernels go from tensor to tensor and take memory on the way. There the update is done in
parts whose weights and moments are copied first, so that a part that fails is put back and done again. The GPU kernels
change everything in place and take none; that nothing has changed after a failure is checked, not assumed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.memory import relief
from unsloth_factory.training.memory.shortage import Shortage, attempt
from unsloth_factory.training.session import Session

UNDO_BYTES = 64 * 2**20
"""Weights and moments that are copied at a time."""
ATTEMPTS = 4
"""Of one update, or part of it: between them everything that can be freed is freed."""


def apply_update(session: Session) -> None:
    """Apply the gradients.

    Raises:
        UserError: The memory does not suffice although the activations are gone.
    """
    if session.job.loaded.device.type != "cpu" or session.accelerator.scaler is not None:
        _apply_whole(session)
        return
    optimizer = session.optimizer.optimizer
    for part in _parts(optimizer):
        _apply_part(session, optimizer, part)


def _apply_whole(session: Session) -> None:
    before = _versions(session.optimizer.optimizer)
    outcome: Any = None
    for _ in range(ATTEMPTS):
        outcome = attempt(session.optimizer.step, session.meter.release)
        if not isinstance(outcome, Shortage):
            return
        if _versions(session.optimizer.optimizer) != before:
            raise UserError(
                f"Out of {session.meter.name} in the middle of the update of step {session.state.step + 1}: the "
                f"weights in memory are of no use any more, the last checkpoint is intact. {session.job.resume_command}"
            )
    raise relief.nothing_for_the_update(session, outcome.message)


def _versions(optimizer: torch.optim.Optimizer) -> list[int]:
    """Counts how often each part of the state was written: torch's own counters, and the step where it is a number."""
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value._version if isinstance(value, torch.Tensor) else int(value) for value in values]


Part = list[dict[str, Any]]
"""Parameter groups that hold some of the parameters."""


def _parts(optimizer: torch.optim.Optimizer) -> list[Part]:
    """The parameter groups, cut into parts of about `UNDO_BYTES` of weights and moments."""
    parts: list[Part] = []
    size = UNDO_BYTES
    for group in optimizer.param_groups:
        fresh = True
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            bytes_here = sum(tensor.nbytes for tensor in _tensors(optimizer, parameter))
            if size + bytes_here > UNDO_BYTES:
                parts.append([])
                size, fresh = 0, True
            if fresh:
                parts[-1].append({**group, "params": []})
                fresh = False
            parts[-1][-1]["params"].append(parameter)
            size += bytes_here
    return parts


def _tensors(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    state = optimizer.state[parameter]
    return [parameter.detach(), *(value for value in state.values() if isinstance(value, torch.Tensor))]


def _apply_part(session: Session, optimizer: torch.optim.Optimizer, part: Part) -> None:
    outcome: Any = None
    for _ in range(ATTEMPTS):
        undo: list[tuple[torch.Tensor, torch.Tensor]] = []
        numbers: list[tuple[dict[str, Any], dict[str, Any]]] = []
        outcome = attempt(partial(_step, optimizer, part, undo, numbers), session.meter.release)
        if not isinstance(outcome, Shortage):
            return
        for tensor, old in undo:
            tensor.copy_(old)
        for state, old_numbers in numbers:
            state.update(old_numbers)
    raise relief.nothing_for_the_update(session, outcome.message)


def _step(
    optimizer: torch.optim.Optimizer,
    part: Part,
    undo: list[tuple[torch.Tensor, torch.Tensor]],
    numbers: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    """Note how everything is that the update of a part changes, then update it."""
    for group in part:
        for parameter in group["params"]:
            undo += [(tensor, tensor.clone()) for tensor in _tensors(optimizer, parameter)]
            state = optimizer.state[parameter]
            numbers.append((state, {key: v for key, v in state.items() if not isinstance(v, torch.Tensor)}))
    groups = optimizer.param_groups
    optimizer.param_groups = part
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
