"""--time_budget on a virtual clock: the real loop and the real planning, with work that only moves the clock."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
import time
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_jobs import Ticking, metrics, said, stopping

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.config.settings import LoopSettings, RunSettings, WatchSettings
from unsloth_factory.data.batching import StepPlan
from unsloth_factory.training import loop
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory import relief
from unsloth_factory.training.pacing import pace
from unsloth_factory.training.pacing.schedule import paced_rate
from unsloth_factory.training.pacing.time_budget import TimeBox, process_started
from unsloth_factory.training.session import LoopState, Session
from unsloth_factory.training.watch import best, guards, held_out

COSINE: dict[str, Any] = {"peak": 1.0, "shape": "cosine", "warmup_ratio": 0.03}


@dataclass
class World:
    """What work takes, s; every duration but the start's is multiplied by noise."""

    start: float = 10.0
    step: float = 0.1
    evaluation: float = 0.0
    batches: int = 4
    save: float = 0.1
    plot: float = 0.4
    exit: float = 0.3
    slow_after: float = float("inf")
    """From this time on steps take three times as long."""
    seed: int = 0
    now: float = 1000.0
    rates: list[tuple[float, float]] = field(default_factory=list)
    """(time, learning rate) of every step."""
    evaluated: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    plots: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.began = self.now
        self.now += self.start

    def work(self, seconds: float) -> None:
        self.now += seconds * self.random.uniform(0.7, 1.5)

    @property
    def used(self) -> float:
        return self.now - self.began


def session_in(
    world: World, budget: float | None, epochs: float, state: LoopState | None = None, **run: Any
) -> Session:
    settings = RunSettings(time_budget=budget, **run)
    model = SimpleNamespace(train=lambda: None)
    job = SimpleNamespace(
        run=settings,
        loop=LoopSettings(epochs=epochs),
        loaded=SimpleNamespace(model=model, has_adapter=True),
        watch=WatchSettings(),
        resume_command="again",
    )
    unused: dict[str, Any] = {part.name: None for part in fields(Session) if part.default is MISSING}
    parts: dict[str, Any] = {
        "job": job,
        "accelerator": SimpleNamespace(num_processes=1, is_main_process=True),
        "plan": StepPlan(n_samples=80, batch_size=2, accumulation_steps=4, epochs=epochs, max_steps=None, seed=1),
        "peak_rate": 1.0,
        "progress": SimpleNamespace(say=world.said.append, start=lambda *_: None, replan=lambda _: None),
        "time_box": TimeBox(budget or float("inf"), world.began, clock=lambda: world.now),
        "state": state or LoopState(),
    }
    return Session(**(unused | parts))


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch):
    """play(world, session): the loop from the present step to the exit of the process."""

    def run(world: World, session: Session) -> None:
        def run_step(session: Session, step: int) -> None:
            world.rates.append((world.used, session.rate(step)))
            first = 10.0 if len(world.rates) == 1 else 1.0
            world.work(world.step * first * (3.0 if world.used > world.slow_after else 1.0))

        def record(session: Session, result: Any) -> None:
            session.state.step += 1

        def look(session: Session, stop: Any) -> dict[str, float] | None:
            for _ in range(world.batches):
                if stop.received is not None:
                    return None
                world.work(world.evaluation / world.batches)
            world.evaluated.append(session.state.step)
            return {"eval_loss": 1.0}

        def save(session: Session) -> None:
            world.work(world.save)
            world.saved.append(session.state.step)

        def plot(session: Session) -> None:
            world.work(world.plot * (5.0 if world.plots == 0 else 1.0))
            world.plots += 1

        for module, name, value in (
            (loop, "run_step", run_step), (guards, "record", record), (guards, "lost", lambda _: False),
            (guards, "sound", lambda _: True), (relief, "watch", lambda _: None), (best, "kept", lambda _: None),
            (held_out, "look", look),
            (held_out, "watches", lambda _: world.evaluation > 0), (held_out, "before", lambda *_: True),
            (loop, "save", save), (loop, "_plot", plot), (loop, "_log", lambda *_: None),
            (loop, "_metrics_line", lambda *_: {}),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, value)
        loop.walk(session, SimpleNamespace(received=None))  # type: ignore[arg-type]
        world.work(world.save)  # the final weights
        if pace.permits_plot(session):
            plot(session)
        world.work(world.exit)

    return run


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("budget", [60, 180, 300, 3600])
@pytest.mark.parametrize("kind", ["plain", "evaluation", "slow start", "slow saves", "slower at half-time"])
def test_ends_within_the_budget(play, budget: float, kind: str, seed: int) -> None:
    worlds = {
        "plain": World(seed=seed),
        "evaluation": World(evaluation=0.01 * budget, seed=seed),
        "slow start": World(start=0.4 * budget, step=0.002 * budget, seed=seed),
        "slow saves": World(save=0.005 * budget, seed=seed),
        "slower at half-time": World(evaluation=0.3, slow_after=budget / 2, seed=seed),
    }
    world = worlds[kind]
    world.step = max(world.step, budget / 1500)
    session = session_in(world, budget, epochs=10_000, eval_steps=max(1, int(budget)), save_steps=200)
    play(world, session)
    assert 0.95 * budget <= world.used <= budget, world.said
    assert world.saved[-1] == session.state.step
    assert session.state.end is not None
    assert not world.evaluated or world.evaluated[-1] == session.state.step
    assert world.plots == 4  # twice early, at half-time, at the end
    # the rate rises over 3 % of the run (of its time: later steps may be slower), then falls to almost nothing
    rates = [rate for _, rate in world.rates]
    top = rates.index(max(rates))
    assert rates[top] > 0.98
    assert 0.02 < top / len(rates) < 0.08
    assert all(a >= b for a, b in itertools.pairwise(rates[top:]))
    assert rates[-1] < 0.005


def test_all_steps_fit(play) -> None:
    world = World(evaluation=0.5)
    session = session_in(world, 3600, epochs=10, save_steps=20)
    play(world, session)
    assert session.state.step == 100
    assert session.state.end is None
    assert "Time box: all 100 steps fit" in world.said[0]
    assert world.used < 60
    assert world.saved[-1] == world.evaluated[-1] == 100
    plain = session_in(World(), None, epochs=10)
    warm_up = 3
    assert [rate for _, rate in world.rates[warm_up:]] == pytest.approx([plain.rate(k) for k in range(warm_up, 100)])


def test_what_will_fit_is_said(play) -> None:
    world = World()
    session = session_in(world, 60, epochs=1000)
    play(world, session)
    words = world.said[0].split()
    assert world.said[0].startswith("Time box: ")
    assert "of 10,000 steps will fit" in world.said[0]
    assert abs(int(words[2]) - session.state.step) < 0.15 * session.state.step
    assert f"step {session.state.step} of 10,000 is the last" in world.said[-1]


def test_an_evaluation_that_takes_too_long_is_given_up(play) -> None:
    world = World(evaluation=100.0, batches=100)
    play(world, session_in(world, 180, epochs=1000))
    assert 0.95 * 180 <= world.used <= 180
    assert world.evaluated == []
    assert "the evaluation was given up after" in "".join(world.said)


def test_evaluations_that_no_longer_fit_are_left_out(play) -> None:
    world = World(evaluation=4.0)
    play(world, session_in(world, 120, epochs=1000, eval_steps=100, save_steps=10))
    assert 0.93 * 120 <= world.used <= 120
    assert world.evaluated[-1] - world.evaluated[-2] > 10


def test_a_stall_costs_the_evaluation_and_the_plot_but_not_the_time(play) -> None:
    class Stalling(World):
        """One step near the end takes all that was kept for the evaluation."""

        def work(self, seconds: float) -> None:
            super().work(seconds)
            if 50 < self.used < 57.8 and not session.state.end:
                self.now = self.began + 57.8

    world = Stalling(evaluation=2.0)
    session = session_in(world, 60, epochs=1000)
    play(world, session)
    assert 57.8 < world.used <= 60
    assert world.saved[-1] == session.state.step
    assert "the last evaluation is left out" in "".join(world.said)


def test_a_budget_that_is_over_before_the_first_step(play) -> None:
    with pytest.raises(UserError, match=r"--time_budget 10s: 12s went by before the first step"):
        play(World(start=12.0), session_in(World(start=12.0), 10, epochs=1))


def test_a_resumed_run_goes_on_from_its_progress(play) -> None:
    world = World(start=0.0)
    first = session_in(world, 100, epochs=1000)
    play(world, first)
    half = next(i for i, (when, _) in enumerate(world.rates) if when > 50)
    state = LoopState(step=half, progress=0.5, step_share=0.5 / half)  # as its checkpoint would have it
    again = World(start=0.0, seed=1)
    session = session_in(again, 30, epochs=1000, state=state)
    play(again, session)
    assert again.used <= 30
    assert again.rates[0][1] == pytest.approx(paced_rate(0.5, 0, **COSINE))
    assert again.rates[-1][1] < 0.005
    # without a budget the rate goes on along the steps that are left
    state = LoopState(step=half, progress=0.5, step_share=0.5 / half)
    free = World(step=0.001)
    play(free, session_in(free, None, epochs=1000, state=state))
    assert free.rates[len(free.rates) // 2][1] == pytest.approx(paced_rate(0.75, 0, **COSINE), rel=1e-3)
    assert state.step == 10_000


def test_a_run_without_a_budget_that_gets_one(play) -> None:
    state = LoopState(step=5000)
    world = World()
    session = session_in(world, 60, epochs=1000, state=state)
    before = session.rate(5000)
    play(world, session)
    assert world.rates[0][1] == pytest.approx(before, abs=0.02)
    assert world.rates[-1][1] < 0.005
    assert world.used <= 60


def test_the_first_process_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks differ: another process takes over what the first one found."""
    session = session_in(World(), 60, epochs=1000)
    session.accelerator = SimpleNamespace(num_processes=2, device="cpu")  # type: ignore[assignment]
    pace.begin(session)
    session.state.step = 1
    told = []

    def broadcast(found: torch.Tensor) -> torch.Tensor:
        told.append(found.tolist())
        return torch.tensor([1.0, 0.75, 0.01], dtype=torch.float64)

    monkeypatch.setattr(pace, "broadcast", broadcast)
    pace.after_step(session)
    assert told[0][0] == 0  # by its own clock it would have gone on
    assert (session.state.progress, session.state.step_share) == (0.75, 0.01)
    assert session.over


def test_a_killed_run_goes_on_from_the_state_of_its_checkpoint(
    tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real work: a signal in step 14 of some 27, and a new budget."""
    loop_settings, run = {"epochs": 1000.0}, {"time_budget": 6.0, "eval_steps": 1000}
    method = stopping(Ticking(monkeypatch), 25)
    with pytest.raises(Stopped):
        train(job_in(tmp_path, method=method, started=0.0, loop=loop_settings, run=run))
    state = json.loads((tmp_path / "checkpoint-14" / "state.json").read_text())["loop"]
    assert 0.4 < state["progress"] < 0.6
    run |= {"resume": "auto", "time_budget": 3.0}
    job = job_in(tmp_path, method=Ticking(monkeypatch), started=0.0, loop=loop_settings, run=run)
    result = train(job)
    assert result.resumed_from == 14
    assert 20 < result.steps < 30
    assert "--time_budget changed from 6.0 to 3.0: accepted (the learning rate decays to the new end)" in said(job)
    rates = [line["lr"] for line in metrics(job)]
    first = paced_rate(state["progress"], state["step_share"], **COSINE | {"peak": 1e-2})
    assert rates[14] == pytest.approx(first, rel=1e-5)
    assert rates[-1] < 1e-3


def test_the_start_of_the_process() -> None:
    program = (
        "import time; begun = time.monotonic(); time.sleep(0.3)\n"
        "from unsloth_factory.training.pacing.time_budget import process_started\n"
        "print(begun, process_started())"
    )
    before = time.monotonic()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    begun, found = map(float, done.stdout.split())
    assert before - 0.05 <= found <= begun + 0.05
    assert process_started() < before
