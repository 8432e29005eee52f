"""Out of GPU memory: the step is done again in smaller pieces, with the same samples and the same result."""

from __future__ import annotations

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.batches import step_batches
from unsloth_factory.training.session import Session


def relieve(session: Session, step: int) -> None:
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
