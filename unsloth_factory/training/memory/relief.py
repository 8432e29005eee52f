"""Out of memory: what is given up, in which order, and the word before it comes to that.

The order follows the price. Fewer tokens in a micro-batch cost little, and isolate a long sample. When one sample alone
does not fit: smaller chunks of logits cost next to nothing, recomputed layers about a third more time, activations in
the CPU's memory the copies; then chunks smaller still. Samples, order and loss of a step stay what they are; with
LoRA dropout the masks may differ, because they are drawn micro-batch by micro-batch.
"""

from __future__ import annotations

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.batching import Batch
from unsloth_factory.training.memory.cuts import row_lengths
from unsloth_factory.training.memory.meter import GIB
from unsloth_factory.training.session import Session

LEAST_LOGITS = 16 * 2**20
"""float32 logits that one chunk may always take, bytes."""


def relieve(session: Session, batch: Batch, when: str) -> None:
    """Pull the next lever for a micro-batch that did not fit; what was being done is then done again.

    Args:
        session: Its levers change, and take effect.
        batch: What did not fit.
        when: For the message: "in step 3", "before step 1".

    Raises:
        UserError: Nothing is left that leaves the result alone.
    """
    meter, levers = session.meter, session.state.levers
    reading = meter.read()
    samples = len(batch.sources) // len(row_lengths(session.job.train_items[0]))
    what = f"{samples} sample{'s' if samples > 1 else ''} of {batch.input_ids.numel():,} tokens in a micro-batch"
    lever = _pull(session, batch, samples)
    if lever is None:
        raise UserError(_nothing_left(session, batch, f"Out of {meter.name} {when} with {what} (peak {reading})"))
    levers.apply(session.job.loaded)
    meter.reset_peak()
    session.progress.say(
        f"Warning: out of {meter.name} {when} with {what} (peak {reading}). It is done again with {lever}. "
        "Each step keeps its samples; results differ by rounding only."
    )


def _pull(session: Session, batch: Batch, samples: int) -> str | None:
    """Change the levers; says what is different from now on, or None when nothing is left."""
    levers, loaded = session.state.levers, session.job.loaded
    if samples > 1:
        levers.micro_batch_tokens = batch.input_ids.numel() // 2
        return f"at most {levers.micro_batch_tokens:,} tokens in a micro-batch of several samples"
    logits = min(4 * loaded.vocabulary * batch.trained_tokens, loaded.logit_bytes) // 4
    again = levers.logit_bytes is not None
    if not again and logits >= LEAST_LOGITS:
        return _smaller_chunks(session, logits)
    if not loaded.recomputes_layers:
        levers.checkpointing = True
        return "each layer computed again in the backward pass instead of kept (slower by about a third)"
    if session.meter.offloads and not levers.offload:
        levers.offload = True
        return "activations kept in the CPU's memory (slower by the copies)"
    return _smaller_chunks(session, logits) if again and logits >= LEAST_LOGITS else None


def _smaller_chunks(session: Session, size: int) -> str:
    session.state.levers.logit_bytes = size
    return f"the logits in chunks of {size / 2**20:,.3g} MiB"


def _nothing_left(session: Session, batch: Batch, what: str) -> str:
    """The message that ends a training: what was tried, and what is left for the user to decide."""
    job, levers = session.job, str(session.state.levers)
    longest = max(1, batch.input_ids.numel() // len(row_lengths(job.train_items[0])))
    ways = [f"a shorter --max_seq_length (such as {max(16, longest // 2)})"]
    if not job.loaded.quantized:
        ways.append("--quantization_bit 4" + ("" if job.loaded.has_adapter else " with --finetuning_type lora"))
    if job.loop.optimizer != "paged_adamw_8bit":
        ways.append("--optimizer paged_adamw_8bit")
    if job.loaded.has_adapter and job.tuning.lora_r > 4:
        ways.append(f"a smaller --lora_r (such as {job.tuning.lora_r // 2})")
    return (
        f"{what}: {batch.sources[0]}. In force already: {levers or 'nothing that would help'}"
        f"{', recomputed layers' if job.loaded.recomputes_layers and 'computed again' not in levers else ''}. "
        f"What is left: {', '.join(ways)}; then start anew with --overwrite. Earlier checkpoints are intact."
    )


def nothing_for_the_update(session: Session, message: str) -> UserError:
    """The error of an update that does not fit although the activations are gone."""
    ways = [] if session.job.loop.optimizer == "paged_adamw_8bit" else ["--optimizer paged_adamw_8bit"]
    ways += ["a smaller --lora_r"] if session.job.loaded.has_adapter else ["--finetuning_type lora"]
    return UserError(
        f"Out of {session.meter.name} in the update of step {session.state.step + 1} "
        f"({session.meter.read().used / GIB:.2f} GiB in use; {message}). Use {', '.join(ways)}, or free memory that "
        f"other programs hold. Earlier checkpoints are intact: {session.job.resume_command}."
    )


def watch(session: Session) -> None:
    """After a step: warn, once for each reason, before the memory runs out."""
    state = session.state
    warning = session.memory_watch.warning(session.meter.read(), session.steps_to_come)
    if warning is not None:
        loop = session.job.loop
        smaller = (
            f"--batch_size {loop.batch_size // 2} --accumulation_steps {2 * loop.accumulation_steps} (the same steps)"
            if loop.batch_size % 2 == 0
            else "a shorter --max_seq_length"
        )
        session.progress.say(
            f"Warning: step {state.step}: {session.meter.name}: {warning}. If it runs out, the step is done again in "
            f"smaller pieces. To keep clear of that: {smaller}."
        )
