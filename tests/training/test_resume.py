"""A run that was stopped and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from training_jobs import metrics, pairs, said, samples, stopping, weights

from unsloth_factory.config.errors import Stopped, UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo, Sft

LORA = TuningSettings(lora_r=4)
CASES = {
    "packed": ({}, LORA),
    "padded, 8 bit": ({"no_packing": True, "optimizer": "adamw_8bit"}, TuningSettings(lora_r=64)),
    "dropout": ({"weight_decay": 0.1}, TuningSettings(lora_r=4, lora_dropout=0.3)),
    "qlora": ({"optimizer": "adamw_8bit"}, TuningSettings(lora_r=64, lora_dropout=0.1, quantization_bit=4)),
    "full": ({"learning_rate": 1e-3}, TuningSettings(finetuning_type="full")),
    "freeze": ({"learning_rate": 1e-3}, TuningSettings(finetuning_type="freeze", freeze_last_n=1)),
}


@pytest.mark.parametrize("case", CASES)
def test_stopped_and_resumed_is_bit_identical(tmp_path: Path, job_in, case: str) -> None:
    loop, tuning = CASES[case]
    straight = job_in(tmp_path / "straight", loop=loop, tuning=tuning, eval_items=samples(3, seed=8))
    train(straight)
    stopped = job_in(
        tmp_path / "run", loop=loop, tuning=tuning, eval_items=samples(3, seed=8), method=stopping(Sft(), 9)
    )
    with pytest.raises(Stopped, match="Stopped at step 4 of 10; everything is saved.*--resume auto") as error:
        train(stopped)
    assert error.value.exit_code == 143
    assert not stopped.folder.final_adapter.exists()
    resumed = job_in(tmp_path / "run", loop=loop, tuning=tuning, eval_items=samples(3, seed=8), run={"resume": "auto"})
    result = train(resumed)
    assert result.resumed_from == 4
    assert weights(resumed) == weights(straight)
    assert metrics(resumed) == metrics(straight)
    assert "Resumed from" in said(resumed)


def test_dpo_resumes_bit_identical(tmp_path: Path, job_in) -> None:
    straight = job_in(tmp_path / "straight", method=Dpo(), train_items=pairs(18))
    train(straight)
    stopped = job_in(tmp_path / "run", method=stopping(Dpo(), 9, signal.SIGINT), train_items=pairs(18))
    with pytest.raises(Stopped) as error:
        train(stopped)
    assert error.value.exit_code == 130
    resumed = job_in(tmp_path / "run", method=Dpo(), train_items=pairs(18), run={"resume": "auto"})
    train(resumed)
    assert weights(resumed) == weights(straight)
    assert metrics(resumed) == metrics(straight)


def test_same_settings_give_the_same_bits_and_other_seeds_do_not(tmp_path: Path, job_in) -> None:
    found = []
    for number, seed in enumerate((1, 1, 2)):
        job = job_in(tmp_path / str(number), loop={"seed": seed, "max_steps": 3})
        train(job)
        found.append(weights(job))
    assert found[0] == found[1] != found[2]


def test_dropout_differs_between_steps(tmp_path: Path, job_in) -> None:
    """The step is part of the seed: two steps on one sample do not drop the same values."""
    tuning = TuningSettings(lora_r=4, lora_dropout=0.5)
    job = job_in(
        tmp_path, tuning=tuning, train_items=samples(1), loop={"max_steps": 4, "learning_rate": 1e-30, "batch_size": 1}
    )
    for name, parameter in job.loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    train(job)
    assert len({line["loss"] for line in metrics(job)}) == 4


def test_going_back_to_an_earlier_checkpoint(tmp_path: Path, job_in) -> None:
    first = job_in(tmp_path, run={"save_total_limit": 5})
    train(first)
    bits, curve = weights(first), metrics(first)
    again = job_in(tmp_path, run={"resume": str(tmp_path / "checkpoint-3"), "save_total_limit": 5})
    assert train(again).resumed_from == 3
    assert "checkpoint-6 is removed" in said(again)
    assert weights(again) == bits
    assert metrics(again) == curve


def test_a_finished_run_writes_its_adapter_again(tmp_path: Path, job_in) -> None:
    first = job_in(tmp_path)
    done = train(first)
    bits, curve = weights(first), metrics(first)
    again = job_in(tmp_path, run={"resume": "auto"})
    result = train(again)
    assert (result.resumed_from, result.steps, result.final_loss) == (10, 10, done.final_loss)
    assert weights(again) == bits
    assert metrics(again) == curve


def test_auto_without_checkpoint_starts_at_zero_and_says_so(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, run={"resume": "auto"}, loop={"max_steps": 2})
    assert train(job).resumed_from is None
    assert "no checkpoint yet; training starts at step 0" in said(job)


def test_overwrite_starts_anew(tmp_path: Path, job_in) -> None:
    train(job_in(tmp_path))
    job = job_in(tmp_path, run={"overwrite": True}, loop={"max_steps": 2})
    train(job)
    assert [line["step"] for line in metrics(job)] == [1, 2]
    assert job.store.steps() == [2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop": {"learning_rate": 5e-3}}, r"--learning_rate: was 0.01, now 0.005"),
        ({"loop": {"epochs": 3.0}}, r"--epochs: was 2.0, now 3.0"),
        ({"loop": {"batch_size": 4}}, r"--batch_size x --accumulation_steps: was 4, now 8"),
        ({"loop": {"optimizer": "adamw_8bit"}}, r"--optimizer: was adamw, now adamw_8bit"),
        (
            {"tuning": TuningSettings(lora_r=4, quantization_bit=4)},
            r"--quantization_bit: was None, now 4",
        ),
        ({"method": Dpo(), "train_items": pairs(18)}, r"--method: was sft, now dpo"),
    ],
)
def test_changed_settings_are_refused(tmp_path: Path, job_in, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Stopped):
        train(job_in(tmp_path, method=stopping(Sft(), 3)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message) as error:
        train(job_in(tmp_path, run={"resume": "auto"}, **changes))
    assert "--overwrite" in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_harmless_changes_are_accepted_and_said(tmp_path: Path, job_in) -> None:
    straight = job_in(tmp_path / "straight")
    train(straight)
    with pytest.raises(Stopped):
        train(job_in(tmp_path / "run", method=stopping(Sft(), 9)))
    job = job_in(
        tmp_path / "run",
        loop={"batch_size": 1, "accumulation_steps": 4, "dataloader_workers": 2},
        run={"resume": "auto", "save_steps": 5},
    )
    train(job)
    text = said(job)
    assert "--batch_size changed from 2 to 1: accepted (same samples in each step" in text
    assert "--save_steps changed from 3 to 5: accepted" in text
    pair = zip(metrics(job), metrics(straight), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], rel=1e-4) for a, b in pair)
