"""Early stopping and the best evaluation: its checkpoint is kept, and the same is found after a kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from training_jobs import metrics, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UsageError, UserError
from unsloth_factory.config.settings import WatchSettings
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Sft
from unsloth_factory.training.watch import best, held_out

HELD_OUT = samples(4, seed=9)


def watch(**values: Any) -> WatchSettings:
    return WatchSettings(**values)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Evaluations give these losses (step -> loss), and no sample is looked at."""
    monkeypatch.setattr(held_out, "evaluate", lambda session, *_: (losses[session.state.step], {}))


def adapter(path: Path) -> dict[str, Any]:
    return load_file(path / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    one, other = adapter(first), adapter(second)
    return all(bool((one[name] == other[name]).all()) for name in one)


def test_patience_ends_the_run_with_the_best_weights(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {1: 3.0, 2: 2.0, 3: 2.5, 4: 2.5, 5: 1.0})
    run = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    job = job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(early_stopping_patience=2))
    result = train(job)
    assert (result.steps, result.best_step, result.final_step, result.best_value) == (4, 2, 2, 2.0)
    assert result.end == "early stopping: loss was no better in 2 evaluations (best 2.0000 at step 2)"
    assert "The run ends at step 4 of 10: early stopping" in said(job)
    assert job.store.steps() == [2, 4]  # the best one survives a limit of one
    assert same(job.folder.final_adapter, tmp_path / "checkpoint-2" / "adapter")
    assert not same(job.folder.final_adapter, tmp_path / "checkpoint-4" / "adapter")
    assert json.loads((job.folder.final_adapter / "unsloth_factory.json").read_text())["extra"]["step"] == 2


def test_patience_that_is_spent_at_the_last_step_ends_nothing(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 2.0, 10: 2.0})
    result = train(job_in(tmp_path, eval_items=HELD_OUT, watch=watch(early_stopping_patience=3)))
    assert (result.steps, result.end, result.final_step) == (10, None, 3)


def test_finished_early_stays_finished(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {1: 2.0, 2: 2.5, 3: 2.5, 4: 1.0, 5: 3.0, 6: 3.0, 7: 3.0})
    run = {"eval_steps": 1, "save_steps": 1}
    first = train(job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(early_stopping_patience=2)))
    assert first.steps == 3
    run["resume"] = "auto"
    again = job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(early_stopping_patience=2))
    bits, curve = weights(again), metrics(again)
    result = train(again)
    assert (result.resumed_from, result.steps, result.end) == (3, 3, first.end)
    assert (weights(again), metrics(again)) == (bits, curve)
    assert "a larger --early_stopping_patience lets it go on" in said(again)
    # and with more patience it does go on, finds a better one, and ends later
    more = job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(early_stopping_patience=3))
    result = train(more)
    assert (result.steps, result.best_step) == (7, 4)
    assert "--early_stopping_patience changed from 2 to 3: accepted" in said(more)


def test_min_delta_and_a_metric_that_rises(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {1: 0.50, 2: 0.52, 3: 0.57, 4: 0.60, 5: 0.62, 6: 0.1}
    monkeypatch.setattr(
        held_out, "evaluate", lambda session, *_: (1.0, {"rewards/accuracies": shares[session.state.step]})
    )
    settings = watch(
        metric_for_best="rewards/accuracies", early_stopping_patience=2, early_stopping_min_delta=0.04, load_best=False
    )
    job = job_in(tmp_path, eval_items=HELD_OUT, run={"eval_steps": 1}, watch=settings)
    result = train(job)
    # +0.02 does not count, +0.05 does, +0.03 and +0.02 do not; the best one is told by any gain
    assert (result.steps, result.best_step, result.best_value, result.final_step) == (5, 5, 0.62, 5)
    assert "(best rewards/accuracies 0.6200 at step 5)" in said(job)


class Killed(BaseException):
    """Nothing is saved on its way out, as after kill -9."""


def killed(call: int) -> Any:
    method = Sft()
    plain, calls = method.loss, iter(range(1, 1000))

    def loss(loaded: Any, batch: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return plain(loaded, batch)

    method.loss = loss  # type: ignore[method-assign]
    return method


# random rows: what is learnt by heart is wrong elsewhere, so that the held-out loss soon rises
OVERFIT: dict[str, Any] = {
    "loop": {"epochs": 8.0, "learning_rate": 5e-2},
    "eval_items": HELD_OUT,
    "watch": WatchSettings(early_stopping_patience=3),
    "run": {"eval_steps": 2, "save_steps": 3, "save_total_limit": 1},
}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"path": tmp_path_factory.mktemp("straight")}


def overfitted(straight: dict[str, Any], job_in: Any) -> dict[str, Any]:
    """The run that was left alone, trained once for all the tests that compare with it."""
    if "result" not in straight:
        job = job_in(straight["path"], **OVERFIT)
        straight |= {"result": train(job), "weights": weights(job), "metrics": metrics(job)}
    return straight


# losses of this run: two micro-batches a step (one at the end of an epoch), and an evaluation has two
@pytest.mark.parametrize("call", [8, 14, 21])
def test_killed_and_resumed_it_stops_at_the_same_step(tmp_path: Path, job_in, straight, call: int) -> None:
    expected = overfitted(straight, job_in)
    result = expected["result"]
    assert result.best_step < result.steps < 40
    with pytest.raises(Killed):
        train(job_in(tmp_path, method=killed(call), **OVERFIT))
    resumed = job_in(tmp_path, **(OVERFIT | {"run": OVERFIT["run"] | {"resume": "auto"}}))
    again = train(resumed)
    assert (again.steps, again.best_step, again.end) == (result.steps, result.best_step, result.end)
    assert weights(resumed) == expected["weights"]
    assert metrics(resumed) == expected["metrics"]


def test_a_signal_in_an_evaluation_loses_no_evaluation(tmp_path: Path, job_in, straight) -> None:
    expected = overfitted(straight, job_in)

    class Interrupted(Sft):
        def loss(self, loaded: Any, batch: Any) -> Any:
            if not loaded.model.training and not self.done:
                self.done = True
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(loaded, batch)

        done = False

    with pytest.raises(Stopped, match="Stopped at step 2 of 40; everything is saved"):
        train(job_in(tmp_path, method=Interrupted(), **OVERFIT))
    assert [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())] == [1]
    resumed = job_in(tmp_path, **(OVERFIT | {"run": OVERFIT["run"] | {"resume": "auto"}}))
    train(resumed)
    assert metrics(resumed) == expected["metrics"]
    assert weights(resumed) == expected["weights"]


def test_the_newest_is_resumed_not_the_best(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 2.0, 10: 2.0})
    with pytest.raises(Stopped):
        train(job_in(tmp_path, eval_items=HELD_OUT, method=stopping(Sft(), 13), run={"save_total_limit": 1}))
    job = job_in(tmp_path, eval_items=HELD_OUT, run={"save_total_limit": 1, "resume": "auto"})
    assert job.store.steps() == [3, 7]
    assert train(job).resumed_from == 7
    assert job.store.steps() == [3, 10]


def test_a_better_one_takes_the_place(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 0.5, 10: 2.0})
    job = job_in(tmp_path, eval_items=HELD_OUT, run={"save_total_limit": 1})
    result = train(job)
    assert job.store.steps() == [9, 10]
    assert (result.final_step, result.best_step) == (10, 9)  # without early stopping the last weights are meant
    assert same(job.folder.final_adapter, tmp_path / "checkpoint-10" / "adapter")


def test_no_keep_best_keeps_none(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 2.0, 10: 2.0})
    train(job := job_in(tmp_path, eval_items=HELD_OUT, run={"save_total_limit": 1}, watch=watch(no_keep_best=True)))
    assert job.store.steps() == [10]
    with pytest.raises(UsageError, match="--no_keep_best"):
        watch(no_keep_best=True, load_best=True)


def test_a_damaged_best_one_is_refused_and_the_last_can_be_had(
    tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 2.0, 10: 2.0})
    with pytest.raises(Stopped):
        train(job_in(tmp_path, eval_items=HELD_OUT, method=stopping(Sft(), 13), watch=watch(load_best=True)))
    with open(tmp_path / "checkpoint-3" / "adapter" / "adapter_model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    run = {"resume": "auto"}
    with pytest.raises(UserError, match="checkpoint-3, the best evaluation's, is damaged: .*--load_best false"):
        train(job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(load_best=True)))
    assert not (tmp_path / "final_adapter").exists()
    job = job_in(tmp_path, eval_items=HELD_OUT, run=run, watch=watch(load_best=False))
    assert train(job).final_step == 10


def test_a_best_one_that_is_gone_is_looked_for_anew(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 1.5, 10: 2.0})
    with pytest.raises(Stopped):
        train(job_in(tmp_path, eval_items=HELD_OUT, method=stopping(Sft(), 13)))
    shutil.rmtree(tmp_path / "checkpoint-3")
    job = job_in(tmp_path, eval_items=HELD_OUT, run={"resume": "auto"})
    assert train(job).best_step == 9
    assert "checkpoint-3, the best one so far, is no longer there" in said(job)


def test_another_metric_looks_anew(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 1.5, 10: 2.0})
    with pytest.raises(Stopped):
        train(job_in(tmp_path, eval_items=HELD_OUT, method=stopping(Sft(), 13)))
    settings = watch(metric_for_best="exact_match", load_best=True)
    job = job_in(tmp_path, eval_items=HELD_OUT, run={"resume": "auto"}, watch=settings)
    result = train(job)
    assert (result.best_step, result.final_step) == (None, 10)
    assert "--metric_for_best changed from loss to exact_match; the best evaluation is looked for anew" in said(job)
    assert "no evaluation tells which weights are best" in said(job)


def test_a_bad_streak_has_no_best_one(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint could not be kept."""
    scripted(monkeypatch, {3: 1.0, 6: 2.0, 9: 1.5, 10: 2.0})
    judged: list[int] = []
    real = best.judge

    def judge(session: Any, figures: Any) -> None:
        session.state.bad_streak = int(session.state.step == 3)
        real(session, figures)
        session.state.bad_streak = 0
        judged.append(session.state.step)

    monkeypatch.setattr(best, "judge", judge)
    assert train(job_in(tmp_path, eval_items=HELD_OUT)).best_step == 9
    assert judged == [3, 6, 9, 10]
