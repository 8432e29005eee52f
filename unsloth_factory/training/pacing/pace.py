"""A training within its time budget: which step is the last, how far the rate is, what else each iteration may do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate.utils import broadcast

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.pacing.time_budget import END, MOST_EVALUATION, TimeBox
from unsloth_factory.training.reporting.progress import duration
from unsloth_factory.training.session import Session
from unsloth_factory.training.signals import StopRequest
from unsloth_factory.training.watch import held_out


def begin(session: Session) -> None:
    """Before the first step.

    Raises:
        UserError: The time is over already.
    """
    box = session.time_box
    if not box.limited or session.over:
        return
    box.open(_saves_at_end(session))
    if session.state.progress is None:
        _place(session)
    if box.left <= box.reserve():
        raise UserError(
            f"--time_budget {duration(box.seconds)}: {duration(box.used)} went by before the first step. "
            "Give it more time: reading the model and the data counts."
        )


def _saves_at_end(session: Session) -> float:
    """What follows the last step, in checkpoints: one, the final weights, and the best one where it is read again."""
    job = session.job
    final = 1.0
    if not job.loaded.has_adapter:  # the whole model in 16 bit, of which perhaps only some layers were trained
        _, total = job.loaded.parameter_counts()
        final = max(1.0, 2.0 * total / session.checkpoint_bytes)
    return 1.0 + final + job.watch.takes_best


def _place(session: Session) -> None:
    """From here the rate follows the progress, which starts where the steps are."""
    state = session.state
    steps_left = session.total_steps - state.step
    state.progress = 1 - steps_left / max(1, session.total_steps - state.schedule_start)
    state.step_share = (1 - state.progress) / max(1, steps_left)


def after_step(session: Session) -> None:
    """Measure the step, advance the rate, and decide whether it was the last."""
    box, state = session.time_box, session.state
    box.lap("step")
    if state.progress is None:
        if not box.limited:
            return
        _place(session)
    assert state.progress is not None
    steps_left = session.total_steps - state.step
    fitting, ends = steps_left, False
    if box.limited and steps_left:
        if box.measured:
            fitting = box.fitting = box.steps_that_fit(steps_left, session.evaluation_steps, session.job.run.save_steps)
        ends = fitting == 0 or not box.step_fits()
    progress, share = box.advance(state.progress, fitting)
    last, state.progress, state.step_share = _first_decides(session, ends, progress, share)
    if last:
        _end(session)
    session.progress.replan(state.step if last else state.step + fitting)


def look(session: Session, stop: StopRequest) -> dict[str, float] | None:
    """What the evaluation finds, if it is due and the time allows it; None when a signal interrupted it."""
    box = session.time_box
    due = session.over or session.state.step % session.evaluation_steps == 0
    if not held_out.watches(session) or not box.evaluates or not _permits(session, "evaluation", due=due):
        return {}
    if not box.limited or session.accelerator.num_processes > 1:
        figures = held_out.look(session, stop)
    else:
        figures = _look_within(session, stop)
    if figures:
        box.lap("evaluation")
        _reconsider(session)
    return figures


def permits_save(session: Session, *, due: bool) -> bool:
    """May a regular checkpoint be written now?"""
    return _permits(session, "save", due=due)


def after_save(session: Session) -> None:
    """Measure the save; one that took very long may have been the last thing there was time for."""
    session.time_box.lap("save")
    _reconsider(session)


def rehearses_plot(session: Session) -> bool:
    """The loss plot is to be drawn once now, to know what it takes."""
    box = session.time_box
    return box.limited and not session.over and box.to_try("plot") and box.step_fits(["plot"])


def permits_plot(session: Session) -> bool:
    """Is there time for the loss plot after the last step?"""
    if not session.time_box.limited or session.time_box.plot_fits:
        return True
    session.progress.say("Time box: the loss plot is left out, there is no time for it")
    return False


def after_plot(session: Session) -> None:
    """Once everything was tried, say how many steps will fit."""
    box, state = session.time_box, session.state
    box.lap("plot")
    if not box.rehearsed:
        return
    steps_left = session.total_steps - state.step
    fitting = box.steps_that_fit(steps_left, session.evaluation_steps, session.job.run.save_steps)
    each = f"{box.costs['step'].mean:.2g} s each, {box.reserve():.2g} s kept for the end"
    if fitting == steps_left:
        text = f"all {session.total_steps:,} steps fit ({each}); the run will end before the time is up"
    else:
        last = state.step + fitting
        text = f"{last:,} of {session.total_steps:,} steps will fit ({each}); the rate decays to step {last:,}"
    session.progress.say(f"Time box: {text}")


def _permits(session: Session, kind: str, *, due: bool) -> bool:
    """May this kind of work take place now?

    What is not known is tried early. After the last step everything takes place. Near the end a regular evaluation or
    save that would cost the last steps is left out.
    """
    box = session.time_box
    if not box.limited or session.over:
        return due
    # After an evaluation that was the best one a checkpoint follows.
    fits = box.step_fits(["evaluation", "save"] if kind == "evaluation" else ["save"])
    return bool(_first_decides(session, (due or box.to_try(kind)) and fits)[0])


def _look_within(session: Session, stop: StopRequest) -> dict[str, float] | None:
    """An evaluation that is given up when it takes too long."""
    box, final = session.time_box, session.over
    limit = box.evaluation_limit(final=final)
    if final and box.costs["evaluation"].high > limit:
        session.progress.say("Time box: the last evaluation is left out, there is no time for it")
        return {}
    until = _Until(stop, box, limit)
    figures = held_out.look(session, until)
    if figures is not None or not until.given_up:
        return figures
    box.lap(None)
    text = f"Time box: the evaluation was given up after {duration(limit)}"
    if not box.costs["evaluation"].values and not final:
        box.evaluates = False
        text += f" ({MOST_EVALUATION:.0%} of the time left), and there will be none; hold out less"
    session.progress.say(text)
    return {}


class _Until:
    """A request to stop that also comes when the time of an evaluation is over."""

    def __init__(self, stop: StopRequest, box: TimeBox, limit: float) -> None:
        self._stop, self._box, self._end = stop, box, box.used + limit
        self.given_up = False

    @property
    def received(self) -> int | None:
        """Number of the signal, or 0 for the time."""
        if self._stop.received is not None or self._box.used <= self._end:
            return self._stop.received
        self.given_up = True
        return 0


def _reconsider(session: Session) -> None:
    """End the run when what was just done took so long that no further step fits."""
    box = session.time_box
    if box.limited and not session.over and _first_decides(session, not box.step_fits())[0]:
        _end(session)


def _end(session: Session) -> None:
    state, box = session.state, session.time_box
    state.end = f"{END}: no further step fits into {duration(box.seconds)}"
    session.progress.say(
        f"Time box: {box.used:.1f} of {box.seconds:g} s are used; step {state.step:,} of {session.total_steps:,} is "
        f"the last, {box.reserve():.1f} s are kept for the end"
    )


def _first_decides(session: Session, *values: float) -> Sequence[float]:
    """What the first process found: clocks differ, and all must do the same."""
    if session.accelerator.num_processes == 1:
        return values
    return broadcast(torch.tensor(values, dtype=torch.float64, device=session.accelerator.device)).tolist()
