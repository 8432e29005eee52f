"""One optimizer step: gradients of all its micro-batches, then one update.

Memory may run out at any point of it. Until the update nothing but gradients has changed, so the step is done again
from the same weights and the same random numbers.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from unsloth_factory.data.batching import Batch
from unsloth_factory.training.batches import look_ahead, step_batches
from unsloth_factory.training.memory import relief
from unsloth_factory.training.memory.offload import offloaded
from unsloth_factory.training.memory.shortage import Shortage, attempt, insist
from unsloth_factory.training.reduce import Sums, reduce_gradients, reduce_number
from unsloth_factory.training.session import Session
from unsloth_factory.training.update import apply_update
from unsloth_factory.training.watch import anomalies

REPEATS = 2
"""Times that a step is done again as it was when the memory ran out outside its micro-batches."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave."""

    loss: float
    """Mean over the step's units; may be NaN or infinite."""
    gradient_norm: float
    """L2 norm before clipping; may be NaN or infinite."""
    tokens: int
    trained_tokens: int
    units: int = 1
    """What the loss is the mean of: tokens or pairs. 0: there was nothing to train on."""
    applied: bool = True
    """The weights were changed."""
    spike: bool = False
    """Loss or gradient norm is far above that of the recent steps."""
    overflow: bool = False
    """fp16: the gradient overflowed under a loss scale that can still fall; the scaler skipped the step."""
    metrics: dict[str, float] = field(default_factory=dict)
    suspects: list[str] = field(default_factory=list)
    """File and row of the samples that a step which is not sound came from; empty for a sound one."""

    @property
    def finite(self) -> bool:
        """Loss and gradient are numbers; otherwise the step was not applied."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


@dataclass(frozen=True)
class Gradients:
    """One step's gradients lie in the parameters, clipped; this is what else is known of them."""

    batches: list[Batch]
    """This process's micro-batches."""
    loss: float
    norm: float
    metrics: dict[str, float]
    units: int
    tokens: int
    trained_tokens: int
    totals: list[torch.Tensor] = field(default_factory=list)
    """Loss of each micro-batch, on the device."""


def run_step(session: Session, step: int) -> StepResult:
    """Do optimizer step `step` (index from 0): gradients of all its micro-batches, then one update.

    The gradient is that of (sum of the loss over the step) / (units of the whole step). With several processes each
    takes its share of the micro-batches, and sums are added over the processes: the result is the same.
    """
    for group in session.optimizer.param_groups:
        group["lr"] = session.rate(step)
    gradients, repeats = _gradients(session, step), 0
    while isinstance(gradients, Shortage):
        repeats += 1
        if repeats > REPEATS:
            raise relief.nothing_for_the_update(session, gradients.message)
        gradients = _gradients(session, step)
    return _update(session, gradients)


def _gradients(session: Session, step: int) -> Gradients | Shortage:
    """Leave the step's gradients in the parameters, in smaller micro-batches where those planned do not fit.

    Several processes meet once before the micro-batches and once after them; what one of them has to do again in
    between is its own business.
    """
    batches, count = insist(partial(_batches, session, step), session.meter.release)
    count = int(reduce_number(session, count))
    if count == 0:
        return Gradients(batches, math.nan, 0.0, {}, 0, *_tokens(session, batches))
    sums = _accumulate(session, step, batches, count)
    while isinstance(sums, Batch):
        relief.relieve(session, sums, f"in step {step + 1}")
        batches, _ = insist(partial(_batches, session, step), session.meter.release)
        sums = _accumulate(session, step, batches, count)
    if isinstance(sums, Shortage):
        return sums
    if session.accelerator.num_processes > 1:
        return _measure(session, batches, sums, count)  # alone it could not do this again
    look_ahead(session, step + 1)  # before the first value is asked for, which is when the device is waited for
    return attempt(partial(_measure, session, batches, sums, count), session.meter.release)


def _batches(session: Session, step: int) -> tuple[list[Batch], int]:
    """This process's micro-batches, and the units in them."""
    batches = step_batches(session, step)
    return batches, sum(session.job.method.count(batch) for batch in batches)


def _accumulate(session: Session, step: int, batches: list[Batch], count: int) -> Sums | Batch | Shortage:
    """Gradients of all micro-batches, summed; or the one that did not fit, if it was one."""
    start_over(session)
    _seed(session, step)
    tried: list[Batch] = []

    def forward_backward() -> Sums:
        sums = Sums(session, session.job.method.figures)
        for batch in batches:
            tried.append(batch)
            add_gradients(session, batch, count, sums)
        return sums

    outcome = attempt(forward_backward, session.meter.release)
    if not isinstance(outcome, Shortage):
        return outcome
    start_over(session)
    session.meter.release()  # the gradients too
    return tried[-1] if tried else outcome


def add_gradients(session: Session, batch: Batch, count: int, sums: Sums) -> None:
    """Forward and backward pass of one micro-batch whose loss is divided by the step's units."""
    with session.accelerator.autocast(), _saved_tensors(session):
        part = session.job.method.loss(session.job.loaded, batch)
    session.accelerator.backward(part.total / count)
    sums.add(part)


def start_over(session: Session) -> None:
    """Forget what is left of a step that was not finished."""
    session.optimizer.zero_grad()
    scaler = session.accelerator.scaler
    if scaler is not None:
        scaler._per_optimizer_states.clear()  # it refuses to unscale twice between two updates


def _saved_tensors(session: Session) -> AbstractContextManager[object]:
    loaded = session.job.loaded
    # the fast engine keeps its activations where autograd's hooks do not see them, and offloads them itself
    return offloaded(loaded) if session.state.levers.offload and loaded.engine != "fast" else nullcontext()


def _measure(session: Session, batches: list[Batch], sums: Sums, count: int) -> Gradients:
    """Reduce over the processes, unscale and clip; the values are read from the device once."""
    reduce_gradients(session)
    session.accelerator.unscale_gradients(session.optimizer)
    limit = session.job.loop.max_grad_norm or math.inf
    norm = torch.nn.utils.clip_grad_norm_(session.parameters, limit)
    loss, metrics = sums.means(count)
    loss_value, norm_value = torch.stack([loss, norm.to(loss.device)]).tolist()
    return Gradients(batches, loss_value, norm_value, metrics, count, *_tokens(session, batches), sums.totals)


def _tokens(session: Session, batches: list[Batch]) -> tuple[int, int]:
    """(tokens, trained tokens) of the step; counted before the update, which is the last that can fail."""
    tokens = int(reduce_number(session, sum(batch.tokens for batch in batches)))
    return tokens, int(reduce_number(session, sum(batch.trained_tokens for batch in batches)))


def _update(session: Session, gradients: Gradients) -> StepResult:
    """Apply the gradients, unless something is not finite: then nothing is applied."""
    scaler = session.accelerator.scaler
    finite = math.isfinite(gradients.loss) and math.isfinite(gradients.norm)
    overflow = not finite and math.isfinite(gradients.loss) and scaler is not None and scaler.get_scale() > 1.0
    spike = finite and anomalies.is_spike(session, gradients.loss, gradients.norm)
    applied = finite and not (spike and anomalies.is_skipped(session))
    suspects: list[str] = []
    if spike:
        suspects = anomalies.largest(session, gradients.batches, gradients.totals)
    elif not finite:
        suspects = anomalies.suspects(session, gradients.batches, gradients.totals, gradients.loss)
    if applied:
        apply_update(session)
    elif scaler is not None and gradients.units:
        scaler.update()  # lowers the loss scale when something is not finite
    session.optimizer.zero_grad()
    return StepResult(
        units=gradients.units,
        applied=applied,
        spike=spike,
        loss=gradients.loss,
        gradient_norm=gradients.norm,
        tokens=gradients.tokens,
        trained_tokens=gradients.trained_tokens,
        overflow=overflow,
        metrics=gradients.metrics,
        suspects=suspects,
    )


def _seed(session: Session, step: int) -> None:
    """Dropout of a step depends on (seed, step, process) alone, so a resumed run draws the same numbers."""
    mixed = (session.job.loop.seed * 1_000_003 + step) * 1_009 + session.accelerator.process_index
    torch.manual_seed(mixed % 2**63)
