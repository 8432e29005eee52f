"""What stands out: a step far above the recent ones, and the micro-batches that a bad step came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

import torch
from accelerate.utils import gather_object

from unsloth_factory.data.batching import Batch
from unsloth_factory.training.session import LoopState, Session

WINDOW = 50
"""Applied steps that a new one is compared with."""
FEWEST = 20
"""Steps before which nothing is judged: the loss falls too fast at first."""
STREAK = 3
"""Spikes in a row that are skipped."""
SIGMA = 1.4826
"""Standard deviation of a normal distribution whose median absolute deviation is 1."""


def is_spike(session: Session, loss: float, norm: float) -> bool:
    """Loss or gradient norm far above the recent steps (unless --loss_spike off).

    Far: many robust standard deviations (median absolute deviation; one outlier does not hide the next) and a multiple
    of the largest recent value, so that rare large values among many small ones, as in DPO or in a learnt-by-heart
    set, are not called spikes. Measured without a false alarm on runs of one to eight samples a step.
    """
    state = session.state
    if session.job.guard.loss_spike == "off":
        return False
    return _stands_out(loss, state.recent_losses, sigmas=10, times=2, least=0.5) or _stands_out(
        norm, state.recent_norms, sigmas=20, times=4, least=1.0
    )


def is_skipped(session: Session) -> bool:
    """A spike is not applied, unless there were several in a row: then this is how high the loss is now."""
    return session.job.guard.loss_spike in ("skip", "rewind") and session.state.spike_streak < STREAK


def _stands_out(value: float, recent: Sequence[float], *, sigmas: float, times: float, least: float) -> bool:
    if len(recent) < FEWEST:
        return False
    middle = median(recent)
    spread = SIGMA * median(abs(other - middle) for other in recent)
    return value > middle + max(sigmas * spread, least) and value > times * max(recent)


def remember(state: LoopState, loss: float, norm: float) -> None:
    """Add an applied step to the window."""
    state.recent_losses = [*state.recent_losses, loss][-WINDOW:]
    state.recent_norms = [*state.recent_norms, norm][-WINDOW:]


def suspects(session: Session, batches: Sequence[Batch], totals: Sequence[torch.Tensor], loss: float) -> list[str]:
    """File and row of the samples that a bad step may come from; the losses are read from the device only here.

    Args:
        session: The running training.
        batches: This process's micro-batches.
        totals: The loss of each, summed.
        loss: Of the whole step. When it is NaN or infinite, the micro-batches that made it so are named; when the
            gradient alone is, every sample.
    """
    values = torch.stack(list(totals)).tolist() if totals else [0.0] * len(batches)
    named = [(not math.isfinite(value), batch.sources) for value, batch in zip(values, batches, strict=True)]
    if session.accelerator.num_processes > 1:
        named = gather_object(named)
    chosen = [sources for is_bad, sources in named if is_bad]
    everything = math.isfinite(loss) or not chosen
    return [source for sources in ([s for _, s in named] if everything else chosen) for source in sources]


def largest(session: Session, batches: Sequence[Batch], totals: Sequence[torch.Tensor]) -> list[str]:
    """Samples of the micro-batch whose mean loss is the largest of the step."""
    values = torch.stack(list(totals)).tolist() if totals else []
    means = [value / max(1, session.job.method.count(batch)) for value, batch in zip(values, batches, strict=True)]
    named = [(mean, batch.sources) for mean, batch in zip(means, batches, strict=True)]
    if session.accelerator.num_processes > 1:
        named = gather_object(named)
    return list(max(named, key=lambda pair: pair[0])[1])
