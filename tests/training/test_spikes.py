"""Loss spikes: found, named, skipped or gone back from; ordinary noise is none."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from training_jobs import metrics, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped
from unsloth_factory.config.settings import GuardSettings
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import LossSum, Sft
from unsloth_factory.training.session import LoopState
from unsloth_factory.training.watch import anomalies


def false_alarms(values: list[float]) -> int:
    recent: list[float] = []
    found = 0
    for value in values:
        found += anomalies._stands_out(value, recent, sigmas=10, times=2, least=0.5)
        recent = [*recent, value][-anomalies.WINDOW :]
    return found


def noise(kind: str) -> list[float]:
    generator = np.random.default_rng(7)
    falling = 0.8 + 1.6 * np.exp(-np.arange(2000) / 400)
    if kind == "small batches":  # step losses spread by a third
        return (falling * np.exp(generator.normal(0, 0.3, 2000))).tolist()
    if kind == "learnt by heart":  # nearly nothing, and now and then a sample that is not yet known
        return np.where(generator.random(2000) < 0.05, generator.uniform(0.1, 0.45, 2000), 0.001).tolist()
    if kind == "preferences":  # most pairs in order, some far from it
        return (-np.log(1 / (1 + np.exp(-generator.normal(1.5, 2.0, (2000, 4)))))).mean(1).tolist()
    return (falling + 0.3 * (np.arange(2000) % 100 == 0)).tolist()  # an epoch's hard rows, always alike


@pytest.mark.parametrize("kind", ["small batches", "learnt by heart", "preferences", "hard rows"])
def test_ordinary_noise_is_no_spike(kind: str) -> None:
    assert false_alarms(noise(kind)) == 0


def test_what_stands_out_by_hand() -> None:
    recent = [1.0, 1.2] * 10  # median 1.1, MAD 0.1: ten robust deviations are 1.4826
    assert not anomalies._stands_out(2.58, recent, sigmas=10, times=2, least=0.5)
    assert anomalies._stands_out(2.59, recent, sigmas=10, times=2, least=0.5)
    assert not anomalies._stands_out(2.59, recent, sigmas=10, times=2.2, least=0.5)
    assert not anomalies._stands_out(1.6, [1.0] * 19, sigmas=10, times=1.1, least=0.5)  # too early to judge
    assert anomalies._stands_out(1.6, [1.0] * 20, sigmas=10, times=1.1, least=0.5)
    assert not anomalies._stands_out(1.6, [1.0] * 20, sigmas=10, times=1.1, least=0.7)


def test_the_window_is_bounded() -> None:
    state = LoopState()
    for number in range(200):
        anomalies.remember(state, float(number), 1.0)
    assert state.recent_losses == [float(number) for number in range(150, 200)]


class Spiky(Sft):
    """SFT whose loss is a multiple in some steps (numbered from 1; two micro-batches each): in the second one only."""

    def __init__(self, steps: Any, factor: float = 8.0) -> None:
        self.steps, self.factor, self.calls = steps, factor, 0
        self.named: list[str] = []

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        if self.calls % 2 or self.calls // 2 not in self.steps:
            return part
        self.named.append(", ".join(batch.sources))
        return LossSum(part.total * self.factor, part.count)


RUN: dict[str, Any] = {
    "train_items": samples(20),
    "loop": {"max_steps": 14, "learning_rate": 1e-3, "warmup_ratio": 0.0},
    "run": {"save_steps": 4},
}


@pytest.fixture
def _early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are judged after five others, so that the runs may be short."""
    monkeypatch.setattr(anomalies, "FEWEST", 5)


runs = pytest.mark.usefixtures("_early")


def guard(policy: Any) -> GuardSettings:
    return GuardSettings(loss_spike=policy)


@runs
def test_a_spike_is_named_and_by_default_applied(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spiky({9}), **RUN)
    result = train(job)
    assert (result.steps, result.spikes, result.skipped_steps) == (14, 1, 0)
    warning = next(line for line in said(job).splitlines() if "far above" in line)
    assert warning.startswith("Warning: step 9: loss ")
    assert warning.endswith(f"the step is applied. Samples: {job.method.named[0]}")
    assert [line["step"] for line in metrics(job) if line.get("spike")] == [9]


@runs
def test_off_says_nothing_and_skip_changes_nothing_but_that_step(tmp_path: Path, job_in) -> None:
    off = job_in(tmp_path / "off", method=Spiky({9}), guard=guard("off"), **RUN)
    assert train(off).spikes == 0
    assert "far above" not in said(off)
    skip = job_in(tmp_path / "skip", method=Spiky({9}), guard=guard("skip"), **RUN)
    result = train(skip)
    assert (result.spikes, result.steps) == (1, 14)
    assert "the step is not applied (1 in a row)" in said(skip)
    assert weights(skip) != weights(off)
    assert metrics(skip)[9]["loss"] != metrics(off)[9]["loss"]
    assert metrics(skip)[8]["loss"] == metrics(off)[8]["loss"]


@runs
def test_a_loss_that_stays_high_is_not_skipped_for_ever(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spiky(range(9, 1000)), guard=guard("skip"), **RUN)
    result = train(job)
    assert result.spikes == 4  # three are skipped, the fourth is the new level
    assert said(job).count("the step is not applied") == 3
    assert said(job).count("the step is applied") == 1


@runs
def test_rewind_after_three_in_a_row_once(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=Spiky(range(10, 13)), guard=guard("rewind"), **RUN)
    result = train(job)
    assert (result.steps, result.rewound) == (14, True)
    assert "3 spikes in a row; back to" in said(job)
    assert "checkpoint-8, once, and on with 0.5 times" in said(job)
    assert [line["step"] for line in metrics(job)] == list(range(1, 15))
    assert result.spikes == 0  # the counters go back as well


@runs
@pytest.mark.parametrize("call", [15, 21])
def test_a_resumed_run_judges_by_the_same_window(tmp_path: Path, job_in, call: int) -> None:
    """Stopped before the spike, and after it."""
    straight = job_in(tmp_path / "straight", method=Spiky({9}), guard=guard("skip"), **RUN)
    train(straight)
    stopped = stopping(Spiky({9}), call)
    with pytest.raises(Stopped):
        train(job_in(tmp_path / "run", method=stopped, guard=guard("skip"), **RUN))
    again = Spiky({9})
    again.calls = 2 * math.ceil(call / 2)  # it counts on
    run = RUN | {"run": RUN["run"] | {"resume": "auto"}}
    resumed = job_in(tmp_path / "run", method=again, guard=guard("skip"), **run)
    train(resumed)
    assert metrics(resumed) == metrics(straight)
    assert weights(resumed) == weights(straight)
    states = [json.loads((j.folder.path / "checkpoint-14" / "state.json").read_text()) for j in (straight, resumed)]
    for name in ("recent_losses", "recent_norms", "spikes", "spike_streak"):
        assert states[0]["loop"][name] == states[1]["loop"][name]
    assert len(states[0]["loop"]["recent_losses"]) == 13
