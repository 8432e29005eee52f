"""The loss on general questions: measured before and while training, and what its rise does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_jobs import metrics, pairs, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.config.settings import WatchSettings
from unsloth_factory.data.types import TokenSample
from unsloth_factory.training.batches import step_batches
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo, Sft
from unsloth_factory.training.session import open_session
from unsloth_factory.training.watch import forgetting, held_out

HELD_OUT = samples(2, seed=9)
GENERAL = samples(6, seed=20)


def general(count: int, seed: int, name: str = "general.jsonl") -> list[TokenSample]:
    return [TokenSample(row.ids, row.trained, f"{name}:{i + 1}") for i, row in enumerate(samples(count, seed=seed))]


REPLAY = general(5, 21)


@pytest.fixture(autouse=True)
def _knows_something(monkeypatch: pytest.MonkeyPatch) -> None:
    # a model of random weights knows nothing, so the guard would be silent
    monkeypatch.setattr(forgetting, "UNKNOWN", 2.0)


def scripted(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Held-out loss 1, general losses by step."""

    def evaluate(session: Any, items: Any, *_: Any) -> tuple[float, dict[str, float]]:
        return (losses[session.state.step] if items is GENERAL else 1.0), {}

    monkeypatch.setattr(held_out, "evaluate", evaluate)


def job_of(job_in: Any, folder: Path, policy: Any = "warn", **changes: Any) -> Any:
    settings = WatchSettings(forgetting=policy, **changes.pop("watch", {}))
    values = {"eval_items": HELD_OUT, "general_items": GENERAL, "replay_items": REPLAY, "watch": settings}
    return job_in(folder, **(values | changes))


def sft_loss(job: Any, rows: Any) -> float:
    """Loss per trained token, row by row."""
    parts = [Sft().loss(job.loaded, Sft().make_batch([row], packing=True, pad_id=0)) for row in rows]
    return sum(part.total.item() for part in parts) / sum(part.count for part in parts)


def test_measured_before_the_first_step_and_at_each_evaluation(tmp_path: Path, job_in) -> None:
    job = job_of(job_in, tmp_path, watch={"forgetting_limit": 50.0})
    with torch.no_grad():
        before = sft_loss(job, GENERAL)
    train(job)
    with torch.no_grad():
        after = sft_loss(job, GENERAL)
    lines = [line for line in metrics(job) if "general_loss" in line]
    assert [line["step"] for line in lines] == [3, 6, 9, 10]
    assert [line["general_loss_start"] for line in lines] == pytest.approx([before] * 4, rel=1e-5)
    assert lines[-1]["general_loss"] == pytest.approx(after, rel=1e-5)
    text = said(job)
    assert f"Before training: general loss {before:.4f} on 6 answers" in text
    assert f"general_loss {after:.4f} ({after - before:+.4f})" in text


def test_measuring_changes_no_weight(tmp_path: Path, job_in) -> None:
    plain = job_in(tmp_path / "plain", eval_items=HELD_OUT)
    train(plain)
    watched = job_of(job_in, tmp_path / "watched")
    train(watched)
    assert weights(watched) == weights(plain)


def test_dpo_measures_the_sft_loss(tmp_path: Path, job_in) -> None:
    job = job_of(job_in, tmp_path, method=Dpo(), train_items=pairs(8), eval_items=pairs(2, seed=3))
    train(job)
    with torch.no_grad():
        after = sft_loss(job, GENERAL)
    assert metrics(job)[-1]["general_loss"] == pytest.approx(after, rel=1e-5)


def test_warns_once_each_time_that_it_passes_the_limit(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, {0: 2.0, 1: 2.29, 2: 2.31, 3: 2.5, 4: 2.2, 5: 2.4, 6: 2.1, 7: 2.0, 8: 2.0, 9: 2.0, 10: 2.0})
    job = job_of(job_in, tmp_path, run={"eval_steps": 1})
    assert train(job).end is None
    warnings = [line for line in said(job).splitlines() if "forgetting" in line]
    assert len(warnings) == 2
    assert (
        "rose by 0.310 to 2.310 nats a token (limit 0.3): each right token there is now 27 % less likely" in warnings[0]
    )
    assert "rose by 0.400" in warnings[1]


def test_a_model_that_knows_nothing_forgets_nothing(tmp_path: Path, job_in, monkeypatch) -> None:
    monkeypatch.setattr(forgetting, "UNKNOWN", 0.5)
    job = job_of(job_in, tmp_path, "stop", watch={"forgetting_limit": 1e-6})
    result = train(job)
    assert (result.steps, result.end) == (10, None)
    assert "there is nothing to forget, and it is not measured again" in said(job)
    assert not any("general_loss" in line for line in metrics(job))


def test_stop_ends_the_run_with_the_best_weights_within_the_limit(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, {0: 2.0, 1: 2.1, 2: 2.2, 3: 2.31})
    held_out_losses = {1: 1.5, 2: 1.2, 3: 0.9}
    plain = held_out.evaluate
    monkeypatch.setattr(
        held_out, "evaluate",
        lambda session, items, *rest: (held_out_losses[session.state.step], {}) if items is HELD_OUT
        else plain(session, items, *rest),
    )  # fmt: skip
    run = {"eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    job = job_of(job_in, tmp_path, "stop", run=run)
    result = train(job)
    assert (result.steps, result.best_step, result.final_step) == (3, 2, 2)
    assert result.end == "forgetting: the loss on general questions rose by 0.310 to 2.310 nats a token (limit 0.3)"
    again = job_of(job_in, tmp_path, "stop", run=run | {"resume": "auto"})
    assert train(again).end == result.end
    assert "--forgetting warn lets it go on" in said(again)


def test_stop_watches_without_held_out_samples(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, {0: 2.0, 3: 2.1, 6: 2.5})
    job = job_of(job_in, tmp_path, "stop", eval_items=(), watch={"load_best": False})
    assert train(job).steps == 6


REPLAYING = {0: 2.0, 3: 2.1, 6: 2.5, 9: 2.5, 10: 2.5}


def test_replay_mixes_general_rows_into_the_following_steps(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, REPLAYING)

    class Spy(Sft):
        seen: list[list[str]] = []  # noqa: RUF012 (one job)

        def loss(self, loaded: Any, batch: Any) -> Any:
            self.seen.append(list(batch.sources))
            return super().loss(loaded, batch)

    job = job_of(job_in, tmp_path, "replay", method=Spy())
    result = train(job)
    assert "from here on 2 general rows are in each step" in said(job)
    mixed = [[s for s in sources if s.startswith("general")] for sources in Spy.seen]
    assert not any(mixed[:11])  # six steps: two micro-batches each, but one in step 5, an epoch's last
    drawn = [rows for rows in mixed if rows]
    assert len(drawn) == 4
    assert all(len(rows) == 2 for rows in drawn)
    assert len({tuple(rows) for rows in drawn}) > 1
    assert result.tokens == 2 * sum(len(row.ids) for row in job.train_items) + sum(
        len(row.ids) for rows in drawn for source in rows for row in REPLAY if row.source == source
    )


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"path": tmp_path_factory.mktemp("replayed")}


# stopped before the limit was passed; between that evaluation and the next checkpoint; and later
@pytest.mark.parametrize("call", [8, 13, 18])
def test_replay_resumes_bit_identical(tmp_path: Path, job_in, monkeypatch, replayed, call: int) -> None:
    scripted(monkeypatch, REPLAYING)
    if "weights" not in replayed:  # the run that was left alone, trained once
        straight = job_of(job_in, replayed["path"], "replay")
        train(straight)
        replayed |= {"weights": weights(straight), "metrics": metrics(straight)}
    with pytest.raises(Stopped):
        train(job_of(job_in, tmp_path / "run", "replay", method=stopping(Sft(), call)))
    resumed = job_of(job_in, tmp_path / "run", "replay", run={"resume": "auto"})
    train(resumed)
    assert weights(resumed) == replayed["weights"]
    assert metrics(resumed) == replayed["metrics"]


def test_replay_goes_on_with_the_same_rows_or_none(tmp_path: Path, job_in, monkeypatch) -> None:
    scripted(monkeypatch, REPLAYING)
    with pytest.raises(Stopped):
        train(job_of(job_in, tmp_path, "replay", method=stopping(Sft(), 13)))
    run = {"resume": "auto"}
    with pytest.raises(UserError, match="Replay of general rows began at step 7 with other rows"):
        train(job_of(job_in, tmp_path, "replay", run=run, replay_items=general(5, 22)))
    job = job_of(job_in, tmp_path, "warn", run=run)
    train(job)
    assert "--forgetting changed from replay to warn: no more general rows are mixed in" in said(job)
    assert "--forgetting changed from replay to warn: accepted (from here on)" in said(job)


@pytest.mark.parametrize("policy", ["replay", "stop"])
def test_after_a_warning_the_resumed_run_may_act(tmp_path: Path, job_in, monkeypatch, policy: Any) -> None:
    scripted(monkeypatch, {0: 2.0, 3: 2.5, 6: 2.5, 9: 2.5, 10: 2.5})
    with pytest.raises(Stopped):
        train(job_of(job_in, tmp_path, method=stopping(Sft(), 8)))
    job = job_of(job_in, tmp_path, policy, run={"resume": "auto"}, watch={"load_best": False})
    result = train(job)
    assert (result.steps == 6) == (policy == "stop")
    assert ("from here on 2 general rows" in said(job)) == (policy == "replay")


def test_replayed_rows_are_a_function_of_seed_and_step(tmp_path: Path, job_in) -> None:
    session = open_session(job_of(job_in, tmp_path, "replay", watch={"replay_samples": 3}), SimpleNamespace())  # type: ignore[arg-type]
    session.state.replay_from = 4
    assert forgetting.replayed(session, 3) == []
    first = [row.source for row in forgetting.replayed(session, 4)]
    assert len(set(first)) == 3
    assert first == [row.source for row in forgetting.replayed(session, 4)]
    assert len({tuple(row.source for row in forgetting.replayed(session, step)) for step in range(4, 30)}) > 5
    assert [source for batch in step_batches(session, 4) for source in batch.sources][-3:] == first


def test_measured_and_replayed_rows_are_apart() -> None:
    rows = general(9, 5)
    measured, replay = forgetting.split_general(rows)
    assert {row.source for row in measured} | {row.source for row in replay} == {row.source for row in rows}
    assert not {row.source for row in measured} & {row.source for row in replay}
    many = general(1000, 5)
    measured, replay = forgetting.split_general(many, most=64)
    assert 32 <= len(measured) <= 64
    assert len(replay) == 500
    assert {int(row.source.split(":")[1]) > 900 for row in measured} == {True, False}  # spread over the file


def test_a_checkpoint_of_a_run_without_the_guard(tmp_path: Path, job_in) -> None:
    """Its start is the first measurement."""
    with pytest.raises(Stopped):
        train(job_in(tmp_path, eval_items=HELD_OUT, method=stopping(Sft(), 9)))
    state = tmp_path / "checkpoint-4" / "state.json"
    assert json.loads(state.read_text())["loop"]["general_start"] is None
    job = job_of(job_in, tmp_path, run={"resume": "auto"})
    train(job)
    lines = [line for line in metrics(job) if "general_loss" in line]
    assert lines[0]["general_loss"] == lines[0]["general_loss_start"] == lines[-1]["general_loss_start"]
    assert math.isfinite(lines[-1]["general_loss"])
