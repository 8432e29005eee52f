"""Sums over the micro-batches of a step, and over the processes of `accelerate launch`."""

from __future__ import annotations

import torch

from unsloth_factory.training.methods.base import LossSum
from unsloth_factory.training.session import Session


class Sums:
    """Adds up micro-batches on the device and divides once: the loss first, then the method's further figures."""

    def __init__(self, session: Session, names: tuple[str, ...]) -> None:
        self.session = session
        self.names = names
        self.totals: list[torch.Tensor] = []
        """Loss of each micro-batch, left on the device: read only when a step has gone wrong."""
        self.values = torch.zeros(1 + len(self.names), dtype=torch.float32, device=session.job.loaded.device)

    def add(self, part: LossSum) -> None:
        """Add one micro-batch."""
        parts = [part.total.detach(), *(part.metrics[name] for name in self.names)]
        self.values += torch.stack(parts).to(self.values)
        self.totals.append(parts[0])

    def means(self, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Over all processes, one that had no micro-batch of this step included."""
        means = _reduce(self.session, self.values) / count
        return means[0], dict(zip(self.names, means[1:].tolist() if self.names else [], strict=True))


def reduce_number(session: Session, value: float) -> float:
    """Sum of a number over the processes."""
    if session.accelerator.num_processes == 1:
        return value
    return _reduce(session, torch.tensor(float(value), dtype=torch.float64, device=session.job.loaded.device)).item()


def reduce_gradients(session: Session) -> None:
    """Add the gradients over the processes, once a step; adapters are small, so no overlap is needed."""
    if session.accelerator.num_processes == 1:
        return
    for parameter in session.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = session.accelerator.reduce(parameter.grad, "sum")


def _reduce(session: Session, values: torch.Tensor) -> torch.Tensor:
    return values if session.accelerator.num_processes == 1 else session.accelerator.reduce(values, "sum")
