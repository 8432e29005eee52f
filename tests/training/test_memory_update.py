"""Memory before step 1, and an update of all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from small_memory import Gauge, SmallCard, bits, losses, opened, quick_collections  # noqa: F401
from training_jobs import load, said, samples

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.training import step, update
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory.probe import probe
from unsloth_factory.training.optimizers import allocate_state, make_optimizer
from unsloth_factory.training.session import LoopState

# --- before step 1


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_probe_changes_no_bit(tmp_path: Path, job_in, optimizer: str) -> None:
    tuning = TuningSettings(lora_r=64, lora_dropout=0.2)
    changes = {"loop": {"optimizer": optimizer, "max_steps": 6}, "tuning": tuning, "eval_items": samples(3, seed=9)}
    train(job_in(tmp_path / "plain", **changes))
    job = job_in(tmp_path / "probed", meter=Gauge(probes=True), **changes)
    train(job)
    assert bits(tmp_path / "probed") == bits(tmp_path / "plain")
    longest = max(len(a.ids) + len(b.ids) for a, b in _neighbours(job))
    assert f"Memory      longest micro-batch of {longest} tokens: peak 1.00 GiB of 8.00 GiB" in said(job)
    resumed = job_in(tmp_path / "probed", meter=Gauge(probes=True), run={"resume": "checkpoint-3"}, **changes)
    train(resumed)
    assert bits(tmp_path / "probed") == bits(tmp_path / "plain")


def test_a_probe_draws_no_random_number(tmp_path: Path, job_in) -> None:
    session = opened(job_in(tmp_path, meter=Gauge(probes=True), tuning=TuningSettings(lora_r=4, lora_dropout=0.2)))
    before = torch.get_rng_state()
    weights = [p.detach().clone() for p in session.parameters]
    probe(session)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(session.parameters, weights, strict=True))
    assert session.state == LoopState()


def _neighbours(job: Any) -> list[list[Any]]:
    session = opened(job)
    groups = [group for k in range(session.total_steps) for group in session.plan.step(k)]
    return [[job.train_items[i] for i in group] for group in groups if len(group) == 2]


def test_a_probe_pulls_the_levers(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, meter=Gauge(probes=True), method=SmallCard(1), loop={"batch_size": 4})
    train(job)
    text = said(job)
    assert text.count("out of GPU memory before step 1") == 2
    assert "out of GPU memory in step" not in text
    assert "GiB; at most" in text  # the line of the probe names what is in force


def test_state_made_beforehand_is_what_the_first_step_makes(random_model_dir: Path) -> None:
    for kind in ("adamw", "adamw_8bit"):
        results = []
        for beforehand in (False, True):
            parameters = load(random_model_dir, TuningSettings(lora_r=64)).trainable_parameters()
            optimizer = make_optimizer(kind, parameters, weight_decay=0.1)
            if beforehand:
                allocate_state(optimizer)
                before = [p.detach().clone() for p in parameters]
                allocate_state(optimizer)
                assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
            torch.manual_seed(1)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            results.append([p.detach().clone() for p in parameters] + _state(optimizer))
        assert len(results[0]) == len(results[1])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [state for state in optimizer.state.values()]
    return [torch.as_tensor(state[key]) for state in states for key in sorted(state)]


def test_a_save_for_which_there_is_no_room_is_repeated(tmp_path: Path, job_in, monkeypatch) -> None:
    from unsloth_factory.training import loop as loop_module

    faults, real = [3], loop_module.write_tensors

    def write(*given: Any) -> None:
        real(*given)
        faults[0] -= 1
        if faults[0] in (0, 1):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop_module, "write_tensors", write)
    job = job_in(tmp_path, loop={"max_steps": 6})
    train(job)
    assert job.store.steps() == [3, 6]
    assert not list(tmp_path.glob(".tmp-*"))


# --- the update


class Exploding:
    """Changes a weight and its state, then runs out of memory, so many times."""

    faults = 0

    def step(self: Any, closure: Any = None) -> Any:
        if Exploding.faults:
            Exploding.faults -= 1
            first = self.param_groups[0]["params"][0]
            first.data.add_(1)
            state = self.state[first]
            state["step"] += 1
            next(value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim).add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(closure)


class ExplodingAdamW(Exploding, torch.optim.AdamW):
    pass


class ExplodingAdamW8bit(Exploding, bitsandbytes.optim.AdamW8bit):
    pass


@pytest.fixture
def exploding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", ExplodingAdamW)
    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", ExplodingAdamW8bit)


def updated(job: Any, faults: int) -> list[torch.Tensor]:
    """Weights and optimizer state after one update with made-up gradients, interrupted so often."""
    session = opened(job)
    probe(session)
    torch.manual_seed(1)
    for parameter in session.parameters:
        parameter.grad = torch.randn_like(parameter)
    for group in session.optimizer.param_groups:
        group["lr"] = 1e-2
    Exploding.faults = faults
    step.apply_update(session)
    assert Exploding.faults == 0
    return [p.detach() for p in session.parameters] + _state(session.optimizer.optimizer)


@pytest.mark.parametrize("undo", [update.UNDO_BYTES, 1])  # the whole at once; a parameter at a time
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_half_done_update_is_put_back(
    tmp_path: Path, job_in, exploding, monkeypatch: pytest.MonkeyPatch, undo: int, optimizer: str
) -> None:
    monkeypatch.setattr(update, "UNDO_BYTES", undo)
    changes = {"loop": {"optimizer": optimizer}, "tuning": TuningSettings(lora_r=64)}
    plain = updated(job_in(tmp_path / "plain", **changes), 0)
    for one, other in zip(plain, updated(job_in(tmp_path / "faulty", **changes), 3), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="Out of memory in the update of step 1.*--optimizer paged_adamw_8bit"):
        updated(job_in(tmp_path / "hopeless", **changes), 99)


def test_a_torn_update_where_nothing_is_put_back_ends_the_run(tmp_path: Path, job_in, exploding, monkeypatch) -> None:
    monkeypatch.setattr(step, "apply_update", update._apply_whole)
    with pytest.raises(UserError, match="in the middle of the update of step 1.*of no use"):
        updated(job_in(tmp_path), 1)
