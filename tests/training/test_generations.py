"""Answers to held-out questions at each evaluation: kept, scored, shown, and in step with the checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from training_jobs import metrics, pairs, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UsageError
from unsloth_factory.config.settings import TuningSettings, WatchSettings
from unsloth_factory.data.types import Conversation, Turn
from unsloth_factory.evaluation.validation.sample_answers import SampleAnswers
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo, Sft
from unsloth_factory.training.watch import generations

HELD_OUT = samples(2, seed=9)
QUESTIONS = [
    Conversation((Turn("user", f"第{i}个问题？"), Turn("assistant", f"第{i}个回答。")), f"held.jsonl:{i}")
    for i in range(1, 6)
]


class Scripted:
    """Answers that depend on the weights, so that a resumed run must have the same ones."""

    def __init__(self, loaded: Any, count: int = 10) -> None:
        self.loaded, self.count = loaded, count

    def __len__(self) -> int:
        return self.count

    def ask(self, numbers: Any) -> list[dict[str, Any]]:
        total = sum(float(p.detach().double().sum()) for p in self.loaded.trainable_parameters())
        return [
            {
                "source": f"held.jsonl:{number}",
                "prompt": f"问题 {number}",
                "reference": "答",
                "answer": f"{total:.12f}\u2028",
                "stopped": number != 1,
                "scores": {"exact_match": float(number % 2), "term_coverage": 0.1 * number if number > 1 else None},
            }
            for number in numbers
        ]


def answers(job: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in job.folder.generations.read_text(encoding="utf-8").split("\n") if line]


def job_with(job_in: Any, folder: Path, count: int = 10, **changes: Any) -> Any:
    job = job_in(folder, **({"eval_items": HELD_OUT, "loop": {"max_steps": 6}} | changes))
    job.__dict__["answerer"] = Scripted(job.loaded, count)
    return job


def test_answers_are_kept_scored_and_shown(tmp_path: Path, job_in) -> None:
    job = job_with(job_in, tmp_path)
    train(job)
    records = answers(job)
    assert [record["step"] for record in records] == [step for step in (0, 3, 6) for _ in range(10)]
    assert set(records[0]) == {"step", "source", "prompt", "reference", "answer", "stopped"}
    assert len({record["answer"] for record in records}) == 3
    assert "问题" in job.folder.generations.read_text(encoding="utf-8")
    line = metrics(job)[2]
    assert line["eval_exact_match"] == 0.5
    # Wilson's interval of 5 in 10; for a coverage the normal one, here of 0.2 to 0.9
    assert (line["eval_exact_match_low"], line["eval_exact_match_high"]) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert line["eval_term_coverage"] == pytest.approx(0.55)
    assert line["eval_term_coverage_high"] == pytest.approx(0.55 + 1.96 * 0.244949 / 8**0.5, abs=1e-5)
    text = said(job)
    assert "eval_exact_match 0.50 [0.24, 0.76]" in text
    assert text.count("  question   问题 0\n") == 2
    assert "(cut off)\n  reference  答" in text
    assert "问题 2" not in text


def test_few_answers_are_shown_but_not_scored(tmp_path: Path, job_in) -> None:
    job = job_with(job_in, tmp_path, 7, loop={"max_steps": 3})
    train(job)
    assert "eval_exact_match" not in metrics(job)[-1]
    assert len(answers(job)) == 14


def test_exact_match_can_tell_the_best_evaluation(tmp_path: Path, job_in) -> None:
    watch = WatchSettings(metric_for_best="exact_match", early_stopping_patience=2)
    job = job_with(job_in, tmp_path, watch=watch, run={"eval_steps": 1})
    result = train(job)
    assert (result.best_step, result.best_value, result.steps) == (1, 0.5, 3)  # always 0.5: never better
    assert watch.answers == 32
    with pytest.raises(UsageError, match="--sample_generations 4: --metric_for_best exact_match needs 8 or more"):
        WatchSettings(metric_for_best="exact_match", sample_generations=4)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"path": tmp_path_factory.mktemp("straight")}


def undisturbed(straight: dict[str, Any], job_in: Any) -> dict[str, Any]:
    """The run that was left alone, trained once."""
    if "answers" not in straight:
        job = job_with(job_in, straight["path"])
        train(job)
        straight |= {"answers": answers(job), "metrics": metrics(job)}
    return straight


def test_resumed_without_gaps_or_doubles(tmp_path: Path, job_in, straight: dict[str, Any]) -> None:
    expected = undisturbed(straight, job_in)
    with pytest.raises(Stopped):
        train(job_with(job_in, tmp_path / "run", method=stopping(Sft(), 9)))
    # written after the checkpoint, as by a run that was killed later
    with open(tmp_path / "run" / "generations.jsonl", "ab") as file:
        file.write(b'{"step": 99}\n{"st')
    resumed = job_with(job_in, tmp_path / "run", run={"resume": "auto"})
    train(resumed)
    assert answers(resumed) == expected["answers"]
    assert metrics(resumed) == expected["metrics"]


def test_a_signal_between_two_answers_asks_again(tmp_path: Path, job_in, straight: dict[str, Any]) -> None:
    expected = undisturbed(straight, job_in)
    job = job_with(job_in, tmp_path / "run")
    plain, parts = job.answerer.ask, iter(range(100))

    def ask(numbers: Any) -> Any:
        if next(parts) == 2:  # two parts before the first step, so this is the first of step 3
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)
        return plain(numbers)

    job.answerer.ask = ask
    with pytest.raises(Stopped):
        train(job)
    assert {record["step"] for record in answers(job)} == {0}
    resumed = job_with(job_in, tmp_path / "run", run={"resume": "auto"})
    train(resumed)
    assert answers(resumed) == expected["answers"]


def test_overwrite_begins_a_new_file(tmp_path: Path, job_in) -> None:
    train(job_with(job_in, tmp_path, loop={"max_steps": 3}))
    job = job_with(job_in, tmp_path, loop={"max_steps": 3}, run={"overwrite": True})
    train(job)
    assert len(answers(job)) == 20


def test_out_of_memory_asks_one_by_one_and_leaves_out(tmp_path: Path, job_in) -> None:
    job = job_with(job_in, tmp_path, loop={"max_steps": 3})
    plain = job.answerer.ask

    def ask(numbers: Any) -> Any:
        if len(numbers) > 1 or numbers == [4]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(numbers)

    job.answerer.ask = ask
    assert train(job).steps == 3
    asked = [int(record["source"].split(":")[1]) for record in answers(job) if record["step"] == 3]
    assert asked == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert "while answering held-out questions (CUDA out of memory" in said(job)


def real(job: Any, **settings: Any) -> SampleAnswers:
    return SampleAnswers(job.loaded, job.template, QUESTIONS, **({"count": 2, "max_new_tokens": 6} | settings))


@pytest.mark.parametrize("method", ["qlora", "dpo"])
def test_generating_leaves_no_trace_in_the_training(tmp_path: Path, job_in, method: str) -> None:
    """The same bits with and without, dropout included: mode and random numbers are as they were."""
    values: dict[str, Any] = {
        "eval_items": HELD_OUT,
        "loop": {"max_steps": 4},
        "tuning": TuningSettings(lora_r=4, lora_dropout=0.3),
    }
    if method == "qlora":
        values["tuning"] = TuningSettings(lora_r=64, lora_dropout=0.3, quantization_bit=4)
    if method == "dpo":
        values |= {"method": Dpo(), "train_items": pairs(18), "eval_items": pairs(2, seed=4)}
    plain = job_in(tmp_path / "plain", **values)
    train(plain)
    job = job_in(tmp_path / "run", **values)
    job.__dict__["answerer"] = real(job)
    train(job)
    assert weights(job) == weights(plain)
    assert [record["source"] for record in answers(job)][:2] == ["held.jsonl:1", "held.jsonl:3"]


def test_real_answers(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path)
    asked = real(job, count=3)
    state, mode = torch.get_rng_state(), job.loaded.model.training
    records = asked.ask([0, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert job.loaded.model.training == mode
    assert [record["source"] for record in records] == ["held.jsonl:1", "held.jsonl:4"]
    assert (records[0]["prompt"], records[0]["reference"]) == ("第1个问题？", "第1个回答。")
    assert set(records[0]["scores"]) == {"exact_match", "term_coverage", "association_coverage", "stopped_by_itself"}
    assert records[0]["scores"]["term_coverage"] is None  # without a pack
    assert asked.ask([2])[0]["answer"] == records[1]["answer"]
    # the adapter answers, not the base
    for name, parameter in job.loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    assert asked.ask([0])[0]["answer"] != records[0]["answer"]


def test_questions_that_do_not_fit_are_not_asked(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path)
    assert len(real(job, count=99)) == 5
    assert len(real(job, count=99, longest_prompt=10)) == 0
    assert len(real(job, count=0)) == 0


def test_trackers_get_every_new_figure(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[int, dict[str, Any]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda self, values, step=None, **_: logged.update({step: values}))
    monkeypatch.setattr("unsloth_factory.training.watch.forgetting.UNKNOWN", 2.0)
    train(job_with(job_in, tmp_path, general_items=samples(2, seed=30), loop={"max_steps": 3}))
    assert {
        "loss", "lr", "grad_norm", "eval_loss", "eval_exact_match", "eval_exact_match_low", "eval_exact_match_high",
        "eval_term_coverage", "general_loss", "general_loss_start",
    } <= set(logged[3])  # fmt: skip
    assert all(isinstance(value, int | float) for values in logged.values() for value in values.values())


def test_figures_by_hand() -> None:
    assert generations.figures([]) == {}
    records = [{"scores": {"a": 1.0, "b": None}}] * 8
    found = generations.figures(records)
    assert set(found) == {"eval_a", "eval_a_low", "eval_a_high"}
    assert found["eval_a_high"] == 1.0


def test_two_processes_share_the_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(index: int) -> Any:
        accelerator = SimpleNamespace(num_processes=2, process_index=index)
        loaded = SimpleNamespace(trainable_parameters=list)
        meter = SimpleNamespace(release=lambda: None)
        return SimpleNamespace(
            job=SimpleNamespace(answerer=Scripted(loaded, 5)), accelerator=accelerator, meter=meter
        )  # fmt: skip

    given: list[Any] = []
    monkeypatch.setattr(generations, "gather_object", lambda part: given.append(part) or part)
    for index in (0, 1):
        generations.ask(session(index), lambda: False)
    assert [[number for number, _ in part] for part in given] == [[0, 2, 4], [1, 3]]
    monkeypatch.setattr(generations, "gather_object", lambda part: given[0] + given[1])
    records = generations.ask(session(0), lambda: False)
    assert records is not None
    assert [record["source"] for record in records] == [f"held.jsonl:{i}" for i in range(5)]
