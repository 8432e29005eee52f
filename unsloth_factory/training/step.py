"""One optimizer step, and the same sums without gradients for the evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.batching import Batch
from unsloth_factory.training.methods.base import LossSum
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


class _Sums:
    """Adds up micro-batches on the device and divides once: the loss first, then the method's further figures."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.names = session.job.method.figures
        self.values = torch.zeros(1 + len(self.names), dtype=torch.float32, device=session.job.loaded.device)

    def add(self, part: LossSum) -> None:
        parts = [part.total.detach(), *(part.metrics[name] for name in self.names)]
        self.values += torch.stack(parts).to(self.values)

    def means(self, count: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Over all processes, one that had no micro-batch of this step included."""
        means = _reduce(self.session, self.values) / count
        return means[0], dict(zip(self.names, means[1:].tolist() if self.names else [], strict=True))


def run_step(session: Session, step: int) -> StepResult:
    """Do optimizer step `step` (index from 0): gradients of all its micro-batches, then one update.

    The gradient is that of (sum of the loss over the step) / (units of the whole step). With several processes each
    takes its share of the micro-batches, and sums are added over the processes: the result is the same.
    """
    gradients = _gradients(session, step)
    while gradients is None:
        _halve_micro_batch(session, step)
        gradients = _gradients(session, step)
    batches, loss, metrics = gradients
    return _update(session, loss, metrics, batches)


def _gradients(session: Session, step: int) -> tuple[list[Batch], torch.Tensor, dict[str, float]] | None:
    """Leave the step's gradients in the parameters; None when the GPU's memory ran out (no weight has changed then)."""
    _seed(session, step)
    batches = step_batches(session, step)
    count = int(_reduce_number(session, sum(session.job.method.count(batch) for batch in batches)))
    for group in session.optimizer.param_groups:
        group["lr"] = session.rate(step)
    session.optimizer.zero_grad()
    sums = _Sums(session)
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
    _reduce_gradients(session)
    return batches, *sums.means(count)


def _halve_micro_batch(session: Session, step: int) -> None:
    """Go on with half the samples in a micro-batch: the step has the same samples, and the same result.

    Raises:
        UserError: There is but one sample in it.
    """
    session.optimizer.zero_grad()
    if session.job.loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    size = session.micro_batch
    if size == 1:
        longest = max(batch.input_ids.numel() for batch in step_batches(session, step))
        raise UserError(
            f"Out of GPU memory in step {step + 1} with one sample in a micro-batch (up to {longest:,} tokens). "
            "Use a shorter --max_seq_length, --quantization_bit 4, --optimizer paged_adamw_8bit, a smaller --lora_r, "
            "or leave out --no_gradient_checkpointing; then start anew with --overwrite."
        )
    session.state.micro_batch = size // 2
    session.progress.say(
        f"Warning: out of GPU memory in step {step + 1} with {size} samples in a micro-batch; the step is repeated "
        f"with {size // 2}. Each step keeps its samples; results differ by rounding only."
    )


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
        tokens=int(_reduce_number(session, sum(batch.tokens for batch in batches))),
        trained_tokens=int(_reduce_number(session, sum(batch.trained_tokens for batch in batches))),
        overflow=overflow,
        metrics=metrics,
        sources=[source for batch in batches for source in batch.sources],
    )


def step_batches(session: Session, step: int) -> list[Batch]:
    """This process's micro-batches of one step: a pure function of (seed, step), so there is no loader state."""
    accelerator = session.accelerator
    planned = session.plan.step(step)[accelerator.process_index :: accelerator.num_processes]
    size = session.micro_batch
    micro = [indices[start : start + size] for indices in planned for start in range(0, len(indices), size)]
    return [_make(session, [session.job.train_items[i] for i in indices]) for indices in micro]


def evaluate(session: Session, stop: Callable[[], bool]) -> tuple[float, dict[str, float]] | None:
    """Loss and figures on the held-out samples, by the same rule; None when `stop` asked to leave early."""
    job, accelerator = session.job, session.accelerator
    size = session.micro_batch
    starts = range(0, len(job.eval_items), size)[accelerator.process_index :: accelerator.num_processes]
    sums, count = _Sums(session), 0
    job.loaded.model.eval()
    try:
        with torch.no_grad():
            for start in starts:
                if stop():
                    return None
                batch = _make(session, job.eval_items[start : start + size])
                with accelerator.autocast():
                    part = job.method.loss(job.loaded, batch)
                sums.add(part)
                count += part.count
    finally:
        job.loaded.model.train()
    loss, metrics = sums.means(int(_reduce_number(session, count)))
    return loss.item(), metrics


def _make(session: Session, items: Sequence[Any]) -> Batch:
    return session.job.method.make_batch(items, packing=session.packing, pad_id=session.pad_id)


def _seed(session: Session, step: int) -> None:
    """Dropout of a step depends on (seed, step, process) alone, so a resumed run draws the same numbers."""
    mixed = (session.job.loop.seed * 1_000_003 + step) * 1_009 + session.accelerator.process_index
    torch.manual_seed(mixed % 2**63)


def _reduce(session: Session, values: torch.Tensor) -> torch.Tensor:
    return values if session.accelerator.num_processes == 1 else session.accelerator.reduce(values, "sum")


def _reduce_number(session: Session, value: float) -> float:
    if session.accelerator.num_processes == 1:
        return value
    return _reduce(session, torch.tensor(float(value), dtype=torch.float64, device=session.job.loaded.device)).item()


def _reduce_gradients(session: Session) -> None:
    """Add the gradients over the processes, once a step; adapters are small, so no overlap is needed."""
    if session.accelerator.num_processes == 1:
        return
    for parameter in session.parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad = session.accelerator.reduce(parameter.grad, "sum")
