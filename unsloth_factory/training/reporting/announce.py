"""What is said before the first step: what trains, on what, how long, and one sample as the model sees it."""

from __future__ import annotations

from rich.text import Text

from unsloth_factory.data.encode import describe_sample
from unsloth_factory.data.types import TokenPair, TokenSample
from unsloth_factory.training.reporting.progress import duration, print_labelled
from unsloth_factory.training.session import Session

PRECISION_TEXT = {
    "no": "float32",
    "bf16": "bfloat16 (float32 trained weights)",
    "fp16": "float16 with loss scaling (float32 trained weights)",
}
MOST_CHARACTERS = 1600


def announce(session: Session) -> None:
    """Print the plan of the training and its first sample."""
    for line in plan_lines(session):
        print_labelled(session.progress.console, line)
    first = session.job.train_items[0]
    for label, sample in _rows(first):
        session.progress.say(f"{label} (what is trained stands between ⟦ and ⟧):")
        session.progress.say(_shown(describe_sample(session.job.template, sample)))


def plan_lines(session: Session) -> list[str]:
    """The plan as lines of text, the notes of the model first."""
    job, loop, plan = session.job, session.job.loop, session.plan
    trainable, total = job.loaded.parameter_counts()
    processes = session.accelerator.num_processes
    rows = " packed into one row" if session.packing else " padded"
    rows = rows if loop.batch_size > 1 else ""
    return [
        *job.loaded.notes,
        f"Engine      {job.loaded.engine}: {job.loaded.engine_reason}",
        f"Precision   {PRECISION_TEXT[session.accelerator.mixed_precision]}, base weights "
        f"{'NF4' if job.loaded.quantized else str(job.loaded.dtype).removeprefix('torch.')}, "
        f"on {job.loaded.device}"
        + (f" x {processes} processes" if processes > 1 else "")
        + (f" ({job.loaded.device_reason})" if job.loaded.device_reason else ""),
        f"Trainable   {trainable:,} of {total:,} parameters ({100 * trainable / total:.2f} %), "
        f"{job.tuning.finetuning_type}",
        f"Samples     {len(job.train_items):,} to train on, {len(job.eval_items):,} held out",
        f"Steps       {plan.total_steps:,} of {loop.batch_size * loop.accumulation_steps} samples "
        f"({loop.batch_size}{rows} x {loop.accumulation_steps}), {_epochs(plan.epoch(plan.total_steps))}",
        f"Optimizer   {loop.optimizer}, peak rate {session.peak_rate:g}, {loop.lr_scheduler_type}, "
        f"warm-up {100 * loop.warmup_ratio:g} %, seed {loop.seed}",
        *_watched(session),
        *_time_lines(session),
    ]


def _time_lines(session: Session) -> list[str]:
    box = session.time_box
    if not box.limited:
        return []
    return [
        f"Time box    {duration(box.seconds)}, {duration(box.used)} of it used so far; how many of the steps fit is "
        "said once the first were measured"
    ]


def _watched(session: Session) -> list[str]:
    """What is looked at on the way, and what may end the run early."""
    job, watch = session.job, session.job.watch
    looked_at = []
    if job.eval_items:
        looked_at.append(f"loss of {len(job.eval_items):,} held-out samples")
    if job.general_items:
        tokens = sum(len(item.ids) for item in job.general_items)
        looked_at.append(f"loss of {len(job.general_items)} general answers ({tokens:,} tokens)")
    if job.answerer is not None:
        looked_at.append(f"{len(job.answerer)} answers to held-out questions")
    lines = [f"Watched     every {session.evaluation_steps} steps: {', '.join(looked_at)}"] if looked_at else []
    if watch.early_stopping_patience is not None:
        lines.append(
            f"Early stop  after {watch.early_stopping_patience} evaluations in a row without a better "
            f"{watch.metric_for_best}; the final weights are the {'best' if watch.takes_best else 'last'} ones"
        )
    return lines


def _epochs(number: float) -> str:
    return "1 epoch" if number == 1 else f"{number:.3g} epochs"


def _rows(item: TokenSample | TokenPair) -> list[tuple[str, TokenSample]]:
    if isinstance(item, TokenPair):
        return [("First pair, chosen", item.chosen), ("First pair, rejected", item.rejected)]
    return [("First sample", item)]


def _shown(text: Text) -> Text:
    """Both ends of a long sample."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return text[:half] + Text(f" [... {len(text) - 2 * half:,} characters ...] ") + text[-half:]
