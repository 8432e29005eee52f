"""--extend_epochs: a run goes on past its end, exactly, and every way out of a refusal is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_jobs import Ticking, metrics, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Sft
from unsloth_factory.training.pacing.schedule import learning_rate

TUNING = TuningSettings(lora_r=4, lora_dropout=0.1)
HELD_OUT = samples(3, seed=8)


def extend(job_in: Any, folder: Path, epochs: float, **changes: Any) -> Any:
    run = {"resume": "auto", "extend_epochs": epochs} | changes.pop("run", {})
    return job_in(folder, run=run, tuning=TUNING, eval_items=HELD_OUT, **changes)


@pytest.fixture
def extended(tmp_path: Path, job_in) -> Any:
    """A finished run of 2 epochs (10 steps) that was then extended by 2, undisturbed."""
    train(job_in(tmp_path / "straight", tuning=TUNING, eval_items=HELD_OUT))
    job = extend(job_in, tmp_path / "straight", 2)
    result = train(job)
    assert (result.steps, result.resumed_from) == (20, 10)
    assert "Extended by 2 epochs: steps 11 to 20, with a warm-up and decay of their own" in said(job)
    return job


@pytest.mark.parametrize("call", [2, 17])  # in steps 11 and 19
def test_stopped_within_the_extension_is_bit_identical(tmp_path: Path, job_in, extended, call: int) -> None:
    train(job_in(tmp_path / "run", tuning=TUNING, eval_items=HELD_OUT))
    before = weights(job_in(tmp_path / "run", tuning=TUNING, run={"resume": "auto"}))
    with pytest.raises(Stopped):
        train(extend(job_in, tmp_path / "run", 2, method=stopping(Sft(), call)))
    job = extend(job_in, tmp_path / "run", 2)
    assert weights(job) == before  # the finished run's adapter stays until the new one is whole
    train(job)
    assert weights(job) == weights(extended) != before
    assert metrics(job) == metrics(extended)
    assert not list((tmp_path / "run").glob(".final*"))


def test_killed_before_the_first_checkpoint_of_the_extension(tmp_path: Path, job_in, extended) -> None:
    train(job_in(tmp_path / "run", tuning=TUNING, eval_items=HELD_OUT))

    class Killed(Sft):
        """The power goes in step 12; the next checkpoint would be that of step 12."""

        calls = 0

        def loss(self, loaded: Any, batch: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                raise KeyboardInterrupt
            return super().loss(loaded, batch)

    with pytest.raises(KeyboardInterrupt):
        train(extend(job_in, tmp_path / "run", 2, method=Killed()))
    job = extend(job_in, tmp_path / "run", 2)
    assert train(job).resumed_from == 10
    assert weights(job) == weights(extended)
    assert metrics(job) == metrics(extended)


def test_the_samples_are_those_of_a_run_of_so_many_epochs(tmp_path: Path, job_in, extended) -> None:
    longer = job_in(tmp_path / "longer", tuning=TUNING, eval_items=HELD_OUT, loop={"epochs": 4.0})
    train(longer)
    assert [line["tokens"] for line in metrics(extended)] == [line["tokens"] for line in metrics(longer)]
    assert [line["epoch"] for line in metrics(extended)] == [line["epoch"] for line in metrics(longer)]


def test_warm_up_and_decay_of_its_own(extended) -> None:
    rates = [line["lr"] for line in metrics(extended)]
    one_run = [learning_rate(k, 10, peak=1e-2, shape="cosine", warmup_ratio=0.03) for k in range(10)]
    assert rates == pytest.approx(one_run * 2)


def test_repeated_it_changes_nothing_and_a_larger_number_extends_further(tmp_path: Path, job_in, extended) -> None:
    folder = tmp_path / "straight"
    bits = weights(extended)
    again = extend(job_in, folder, 2)
    assert train(again).steps == 20
    assert "Extended" not in said(again)
    assert weights(again) == bits
    for fewer in ({"resume": "auto"}, {"resume": "auto", "extend_epochs": 1.0}):
        with pytest.raises(UserError, match="was extended by 2 epochs. Continue it with --extend_epochs 2, or"):
            train(job_in(folder, run=fewer, tuning=TUNING))
    further = extend(job_in, folder, 3)
    assert train(further).steps == 25
    assert metrics(further)[-1]["epoch"] == 5.0


def test_an_unfinished_run_is_extended_from_where_it_is(tmp_path: Path, job_in) -> None:
    with pytest.raises(Stopped):
        train(job_in(tmp_path, tuning=TUNING, method=stopping(Sft(), 9)))  # in step 5
    job = extend(job_in, tmp_path, 1)
    assert train(job).steps == 15
    assert "Extended by 1 epoch: steps 6 to 15" in said(job)
    rates = [line["lr"] for line in metrics(job)]
    one_run = [learning_rate(k, 10, peak=1e-2, shape="cosine", warmup_ratio=0.03) for k in range(10)]
    assert rates[5:] == pytest.approx(one_run)


def test_beyond_max_steps(tmp_path: Path, job_in) -> None:
    train(job_in(tmp_path, tuning=TUNING, loop={"max_steps": 3}))
    job = extend(job_in, tmp_path, 1, loop={"max_steps": 3})
    assert train(job).steps == 8  # 3 and the 5 of an epoch


def test_a_run_that_its_time_ended_is_extended(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"loop": {"epochs": 1000.0}, "run": {"time_budget": 6.0, "eval_steps": 1000}}
    first = train(job_in(tmp_path, tuning=TUNING, method=Ticking(monkeypatch), started=0.0, **settings))
    assert first.end == "time budget: no further step fits into 6s"
    assert 20 < first.steps < 35
    settings["run"] |= {"resume": "auto"}
    again = job_in(tmp_path, tuning=TUNING, method=Ticking(monkeypatch), started=0.0, **settings)
    assert train(again).steps == first.steps
    assert "The run has ended (time budget: no further step fits into 6s); --extend_epochs 1 would go on" in said(again)
    settings["run"] |= {"extend_epochs": 2.0}
    job = job_in(tmp_path, tuning=TUNING, method=Ticking(monkeypatch), started=0.0, **settings)
    second = train(job)
    assert f"Extended by 2 epochs: steps {first.steps + 1} to 5,010" in said(job)
    assert second.steps > first.steps + 20
    rates = [line["lr"] for line in metrics(job)]
    assert rates[first.steps - 1] < 1e-3
    assert max(rates[first.steps :]) > 9e-3
    assert rates[-1] < 1e-3


@pytest.mark.parametrize(
    ("changes", "ways", "not_a_way"),
    [
        ({"loop": {"epochs": 5.0}}, ["--epochs 2 --extend_epochs 3", "--adapter {run}/final_adapter"], None),
        ({"loop": {"epochs": 1.0}}, ["--extend_epochs N", "--adapter {run}/final_adapter"], "--extend_epochs -1"),
        ({"loop": {"max_steps": 50}}, ["--extend_epochs N"], None),
        ({"train_items": samples(18, seed=1)}, ["--adapter {run}/final_adapter", "another --output_dir"], "extend"),
        ({"tuning": TuningSettings(lora_r=8)}, ["give the old values", "--overwrite here"], "--adapter"),
    ],
)
def test_every_refusal_names_its_ways_out(
    tmp_path: Path, job_in, changes: dict[str, Any], ways: list[str], not_a_way: str | None
) -> None:
    train(job_in(tmp_path))
    with pytest.raises(UserError) as refused:
        train(job_in(tmp_path, run={"resume": "auto"}, **changes))
    for way in ways:
        assert way.format(run=tmp_path) in str(refused.value)
    assert not_a_way is None or not_a_way not in str(refused.value)


def test_before_there_is_a_result_the_checkpoint_is_the_way_out(tmp_path: Path, job_in) -> None:
    with pytest.raises(Stopped):
        train(job_in(tmp_path, method=stopping(Sft(), 9)))
    with pytest.raises(UserError, match=f"--adapter {tmp_path}/checkpoint-5/adapter and another --output_dir"):
        train(job_in(tmp_path, run={"resume": "auto"}, train_items=samples(18, seed=1)))
