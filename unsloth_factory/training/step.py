"""One optimizer step: gradients of all its micro-batches, then one update."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from unsloth_factory.data.batching import Batch
from unsloth_factory.training import memory
from unsloth_factory.training.batches import step_batches
from unsloth_factory.training.reduce import Sums, reduce_gradients, reduce_number
from unsloth_factory.training.session import Session


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Mean over the step's units; may be NaN or infinite."""
    gradient_norm: float
    """L2 norm before clipping; may be NaN or infinite."""
    tokens: int
    trained_tokens: int
    overflow: bool = False
    """fp16: the gradient overflowed under a loss scale that can still fall; the scaler skipped the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    """File and row of the samples."""

    @property
    def finite(self) -> bool:
        """Loss and gradient are numbers; otherwise the step was not applied."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


def run_step(session: Session, step: int) -> StepResult:
    """Do optimizer step `step` (index from 0): gradients of all its micro-batches, then one update.

    The gradient is that of (sum of the loss over the step) / (units of the whole step). With several processes each
    takes its share of the micro-batches, and sums are added over the processes: the result is the same.
    """
    gradients = _gradients(session, step)
    while gradients is None:
        memory.relieve(session, step)
        gradients = _gradients(session, step)
    batches, loss, metrics = gradients
    return _update(session, loss, metrics, batches)


def _gradients(session: Session, step: int) -> tuple[list[Batch], torch.Tensor, dict[str, float]] | None:
    """Leave the step's gradients in the parameters; None when the GPU's memory ran out (no weight has changed then)."""
    _seed(session, step)
    batches = step_batches(session, step)
    count = int(reduce_number(session, sum(session.job.method.count(batch) for batch in batches)))
    for group in session.optimizer.param_groups:
        group["lr"] = session.rate(step)
    session.optimizer.zero_grad()
    sums = Sums(session, session.job.method.figures)
    try:
        for batch in batches:
            with session.accelerator.autocast():
                part = session.job.method.loss(session.job.loaded, batch)
            session.accelerator.backward(part.total / count)
            sums.add(part)
    except torch.OutOfMemoryError:
        if session.accelerator.num_processes > 1:
            raise  # the others are already waiting for this process's gradients
        return None
    reduce_gradients(session)
    return batches, *sums.means(count)


def _update(session: Session, loss: torch.Tensor, metrics: dict[str, float], batches: list[Batch]) -> StepResult:
    """Clip and apply, unless something is not finite: then nothing is applied."""
    session.accelerator.unscale_gradients(session.optimizer)
    limit = session.job.loop.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(session.parameters, limit)
    loss_value, norm_value = torch.stack([loss, norm.to(loss.device)]).tolist()
    scaler = session.accelerator.scaler
    finite = math.isfinite(loss_value) and math.isfinite(norm_value)
    overflow = not finite and math.isfinite(loss_value) and scaler is not None and scaler.get_scale() > 1.0
    if finite:
        session.optimizer.step()
    elif scaler is not None:
        scaler.update()  # lowers the loss scale
    session.optimizer.zero_grad()
    return StepResult(
        loss=loss_value,
        gradient_norm=norm_value,
        tokens=int(reduce_number(session, sum(batch.tokens for batch in batches))),
        trained_tokens=int(reduce_number(session, sum(batch.trained_tokens for batch in batches))),
        overflow=overflow,
        metrics=metrics,
        sources=[source for batch in batches for source in batch.sources],
    )


def _seed(session: Session, step: int) -> None:
    """Dropout of a step depends on (seed, step, process) alone, so a resumed run draws the same numbers."""
    mixed = (session.job.loop.seed * 1_000_003 + step) * 1_009 + session.accelerator.process_index
    torch.manual_seed(mixed % 2**63)
