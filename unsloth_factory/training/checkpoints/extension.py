"""`--extend_epochs`: a run goes on past its last epoch, with a warm-up and decay of their own.

The steps of the extension have the samples that a run of so many epochs would have there, because a step is a function
of (seed, step) alone. Where the extension began is in the state of its checkpoints: killed and resumed it ends with the
same bits. Killed before its first checkpoint it begins again where it began, with the same result.
"""

from __future__ import annotations

from unsloth_factory.config.errors import UserError
from unsloth_factory.training.pacing.time_budget import END
from unsloth_factory.training.session import Session


def apply(session: Session) -> None:
    """After a checkpoint was restored: begin the extension that is asked for, unless the checkpoint is already in it.

    Raises:
        UserError: The run was extended further than is asked for now.
    """
    state, asked = session.state, session.job.run.extend_epochs or 0.0
    if asked < state.extended_epochs:
        raise UserError(
            f"This run was extended by {state.extended_epochs:g} epochs. Continue it with --extend_epochs "
            f"{state.extended_epochs:g}, or extend it further with a larger number."
        )
    if asked == state.extended_epochs:
        if state.end is not None and state.end.startswith(END):
            more = (state.extended_epochs or 0) + 1
            session.progress.say(f"The run has ended ({state.end}); --extend_epochs {more:g} would go on")
        return
    state.extended_epochs, state.schedule_start = asked, state.step
    state.progress = state.end = None
    state.stale_evaluations = 0
    epochs = "1 epoch" if asked == 1 else f"{asked:g} epochs"
    session.progress.say(
        f"Extended by {epochs}: steps {state.step + 1:,} to {session.total_steps:,}, with a warm-up and decay of "
        "their own"
    )
