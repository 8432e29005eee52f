"""The one training loop. Read it from top to bottom: that is the order in which things happen."""

from __future__ import annotations

import functools
import math
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.data.split import write_validation_split
from unsloth_factory.run.atomic import partial, publish_folder, require_free_space, write_text
from unsloth_factory.training.checkpoints import extension, resume
from unsloth_factory.training.checkpoints.store import Checkpoint, disk_errors
from unsloth_factory.training.checkpoints.tensors import read_tensors, require_finite, write_tensors
from unsloth_factory.training.job import TrainingJob, TrainResult
from unsloth_factory.training.memory import relief
from unsloth_factory.training.memory.probe import probe
from unsloth_factory.training.memory.shortage import insist
from unsloth_factory.training.pacing import pace
from unsloth_factory.training.reporting.announce import announce
from unsloth_factory.training.reporting.plot import plot_loss
from unsloth_factory.training.reporting.progress import Progress, peak_memory
from unsloth_factory.training.session import Session, open_session
from unsloth_factory.training.signals import StopSignals
from unsloth_factory.training.step import StepResult, run_step
from unsloth_factory.training.watch import best, forgetting, guards, held_out


def train(job: TrainingJob) -> TrainResult:
    """Train to the last step, from the first one or from the checkpoint that `--resume` names.

    Raises:
        UserError: See the message; checkpoints taken so far are intact.
        Stopped: A signal came; the state was saved, and the run can be resumed.
    """
    with Progress(job.console, job.run.logging_steps) as progress, StopSignals(progress.say) as stop:
        session = open_session(job, progress)
        begin(session)
        announce(session)
        probe(session)
        walk(session, stop)
        return finish(session)


def begin(session: Session) -> None:
    """Restore the checkpoint, or prepare the folder for a new run."""
    job = session.job
    checkpoint = job.store.to_resume()
    if checkpoint is None:
        _start_afresh(session)
    else:
        _check_continuation(session, checkpoint)
        _say_what_was_lost(session, checkpoint)
        restore(session, checkpoint)
        best.reconsider(session)
        forgetting.reconsider(session)
        if session.accelerator.is_main_process:
            job.store.discard_after(checkpoint.step)
        session.resumed_from = checkpoint.step
        session.progress.say(f"Resumed from {checkpoint.path} at step {checkpoint.step}")
    if session.accelerator.is_main_process:
        _write_run_files(job)
    session.accelerator.wait_for_everyone()


def _start_afresh(session: Session) -> None:
    job = session.job
    if not session.accelerator.is_main_process:
        return
    # The newest is written before the oldest is deleted; the best is kept beside them.
    copies = job.run.save_total_limit + 1 + bool(job.eval_items and not job.watch.no_keep_best)
    try:
        require_free_space(job.folder.path, copies * session.checkpoint_bytes, f"Training with {copies} checkpoints")
    except UserError:
        if not job.folder.metrics.exists():
            job.folder.data_report.unlink(missing_ok=True)  # nothing was trained here: leave no folder behind
        raise
    if job.run.overwrite:
        job.store.discard_all()
        for old in (job.folder.final_adapter, job.folder.final_model):
            shutil.rmtree(old, ignore_errors=True)  # or a run stopped half-way would show the old result as its own
    session.metrics.start(0, session.progress.say)
    session.generations.start(0, session.progress.say)


def _check_continuation(session: Session, checkpoint: Checkpoint) -> None:
    resume.check_same(checkpoint.state["fingerprint"], session.fingerprint, checkpoint.path)
    job = session.job
    new = resume.harmless_settings(job.loop, job.run, job.watch, job.guard)
    for line in resume.accepted_changes(checkpoint.state["harmless"], new):
        session.progress.say(line)


def _say_what_was_lost(session: Session, checkpoint: Checkpoint) -> None:
    """A process that is killed says nothing itself: the steps after its last checkpoint do."""
    lost = session.metrics.lines_after(checkpoint.state["metrics_bytes"]) if _is_here(session.job, checkpoint) else 0
    if lost and session.job.run.resume == "auto":
        session.progress.say(
            f"The run ended without saving, {lost} step{'s' if lost > 1 else ''} after {checkpoint.path.name} (an "
            "error, no power, or killed with signal 9, as the kernel does when memory runs out): they are done again"
        )


def _is_here(job: TrainingJob, checkpoint: Checkpoint) -> bool:
    return checkpoint.path.resolve().parent == job.folder.path.resolve()


def restore(session: Session, checkpoint: Checkpoint) -> None:
    """Set weights, optimizer, counters and metrics.jsonl to what they were when the checkpoint was taken."""
    job = session.job
    read_tensors(checkpoint.path, job.loaded, session.optimizer.optimizer)
    if session.accelerator.scaler is not None and checkpoint.state["scaler"]:
        session.accelerator.scaler.load_state_dict(checkpoint.state["scaler"])
    levers = session.state.levers
    session.state.load(checkpoint.state["loop"])
    session.state.levers = levers.joined(session.state.levers)  # what did not fit before a rewind does not fit after it
    session.state.levers.apply(job.loaded)
    extension.apply(session)
    if session.accelerator.is_main_process:
        here = _is_here(job, checkpoint)
        session.metrics.start(checkpoint.state["metrics_bytes"] if here else 0, session.progress.say)
        session.generations.start(checkpoint.state.get("generations_bytes", 0) if here else 0, session.progress.say)


def _write_run_files(job: TrainingJob) -> None:
    """What later commands read. Written before the first step, so that a run that is stopped half-way has it too."""
    job.folder.write(job.manifest)
    write_text(job.folder.template, job.template.source)
    if job.held_out:
        write_validation_split(job.folder.validation_split, job.held_out)


def walk(session: Session, stop: StopSignals) -> None:
    """Every step from the present one to the last: update, evaluate, log, save.

    Raises:
        UserError: Too many steps in a row were not finite, or the disk is full.
        Stopped: A signal came.
    """
    state, run = session.state, session.job.run
    session.job.loaded.model.train()
    session.progress.start(state.step, session.total_steps)
    if state.step == 0:
        _look_before(session, stop)
    pace.begin(session)
    while state.pending is not None or not session.over:
        started = time.monotonic()
        if state.pending is None:
            result = run_step(session, state.step)
            guards.record(session, result)
            relief.watch(session)
            state.pending = _metrics_line(session, result, time.monotonic() - started)
            if guards.lost(session):
                _log(session, state.pending)
                guards.rewind(session, result, restore)
                continue
            pace.after_step(session)
        figures = pace.look(session, stop)
        state.seconds += time.monotonic() - started
        if figures is not None:
            _log(session, state.pending | figures)
            state.pending = None
        stopped = _stop_signal(session, stop)
        # During a bad streak no regular checkpoint is taken: the one before it is what the run may be set back to.
        regular = pace.permits_save(session, due=state.step % run.save_steps == 0) or best.kept(session) == state.step
        if (regular and guards.sound(session)) or stopped or session.over:
            save(session)
            pace.after_save(session)
        if pace.rehearses_plot(session):
            _plot(session)
            pace.after_plot(session)
        if stopped and (state.pending is not None or not session.over):
            raise Stopped(
                f"Stopped at step {state.step} of {session.total_steps}; everything is saved. "
                f"Continue with: {session.job.resume_command}",
                stopped,
            )


def _look_before(session: Session, stop: StopSignals) -> None:
    """What the untrained model can do, for comparison; before the first step there is nothing to save."""
    started = time.monotonic()
    if not held_out.before(session, stop):
        raise Stopped("Stopped before the first step; nothing was to be saved", _stop_signal(session, stop))
    session.state.seconds += time.monotonic() - started


def _stop_signal(session: Session, stop: StopSignals) -> int:
    """Number of the signal that any process received, or 0."""
    received = stop.received or 0
    if session.accelerator.num_processes == 1:
        return received
    flag = torch.tensor([received], device=session.accelerator.device)
    return int(session.accelerator.gather(flag).max())


def _metrics_line(session: Session, result: StepResult, seconds: float) -> dict[str, Any]:
    return {
        "step": session.state.step,
        "epoch": session.plan.epoch(session.state.step),
        "loss": _finite(result.loss),
        "lr": session.rate(session.state.step - 1),
        "grad_norm": _finite(result.gradient_norm),
        "tokens": result.tokens,
        "trained_tokens": result.trained_tokens,
        "tokens_per_second": result.tokens / max(seconds, 1e-9),
        "memory": peak_memory(session.job.loaded.device),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **{name: _finite(value) for name, value in result.metrics.items()},
        **({"spike": 1} if result.spike else {}),
    }


def _finite(value: float) -> float | None:
    # JSON has no NaN: a skipped step's loss is null
    return value if math.isfinite(value) else None


def _log(session: Session, line: dict[str, Any]) -> None:
    if session.accelerator.is_main_process:
        session.metrics.append(line)
    numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
    session.accelerator.log(numbers, step=line["step"])
    session.progress.step(
        line["step"],
        loss=math.nan if line["loss"] is None else line["loss"],
        rate=line["lr"],
        tokens_per_second=line["tokens_per_second"],
        memory=line["memory"],
    )


def save(session: Session) -> None:
    """Save a checkpoint of the present step.

    Raises:
        UserError: The disk is full; earlier checkpoints are intact.
    """
    session.accelerator.wait_for_everyone()
    if not session.accelerator.is_main_process:
        return
    job, scaler = session.job, session.accelerator.scaler
    state = {
        "step": session.state.step,
        "loop": session.state.to_dict(),
        "scaler": scaler.state_dict() if scaler is not None else {},
        "metrics_bytes": session.metrics.flush(),
        "generations_bytes": session.generations.flush(),
        "fingerprint": session.fingerprint,
        "harmless": resume.harmless_settings(job.loop, job.run, job.watch, job.guard),
    }
    write = functools.partial(
        job.store.save,
        session.state.step,
        lambda folder: write_tensors(folder, job.loaded, session.optimizer.optimizer),
        state,
        session.checkpoint_bytes,
        keep=best.kept(session),
    )
    insist(write, session.meter.release)  # for want of memory nothing is left behind, so it can be done again


def finish(session: Session) -> TrainResult:
    """Write the final weights and the loss plot.

    Raises:
        UserError: Not one step could be applied, or the disk is full. The last checkpoint is intact.
    """
    job, state = session.job, session.state
    if state.applied == 0:
        raise UserError(
            f"None of the {state.step} steps had a finite loss and gradient; no weights are written. "
            "Check the samples named above and the base model."
        )
    final_step = best.take(session)
    path = job.folder.final_adapter if job.loaded.has_adapter else job.folder.final_model
    if session.accelerator.is_main_process:
        require_finite(job.loaded, path.name)
        with disk_errors(str(path), "Free some space and repeat the command with --resume auto: training is done."):
            _publish_weights(job, path, final_step)
        if pace.permits_plot(session):
            _plot(session)
    session.accelerator.end_training()
    return TrainResult(
        steps=state.step,
        final_loss=state.last_loss,
        eval_loss=state.eval_loss,
        best_eval_loss=state.best_eval_loss,
        best_step=state.best_step,
        best_value=state.best_value,
        final_step=final_step,
        end=state.end,
        eval_metrics=state.eval_metrics,
        seconds=state.seconds,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        skipped_steps=state.skipped,
        scaler_skips=state.scaler_skips,
        spikes=state.spikes,
        rewound=state.rewound,
        resumed_from=session.resumed_from,
        adapter_path=path,
    )


def _plot(session: Session) -> None:
    job = session.job
    if session.accelerator.is_main_process:
        plot_loss(session.metrics.read(), job.folder.loss_plot, f"{job.folder.path.name}: {job.method.name}")


def _publish_weights(job: TrainingJob, path: Path, step: int) -> None:
    if not job.loaded.has_adapter:
        job.loaded.save_full(path)
        return
    facts = {"method": job.method.name, "thinking": job.manifest.thinking, "step": step}
    facts["chat_template_sha256"] = job.template.sha256
    temporary = partial(path)
    shutil.rmtree(temporary, ignore_errors=True)
    publish_folder(job.loaded.save_adapter(temporary, facts), path)
