"""Rows 10, 13, 14 and 15 of the table of faults: other batch sizes, and memory that runs out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "training"))

from training_jobs import job_in, said, samples  # noqa: E402, F401

from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.run.atomic import sha256  # noqa: E402
from unsloth_factory.training import step as step_module  # noqa: E402
from unsloth_factory.training.loop import train  # noqa: E402
from unsloth_factory.training.methods import Sft  # noqa: E402


@pytest.fixture
def applied(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The samples of every step that was applied, in order."""
    seen: list[list[str]] = []
    update = step_module._update

    def noting(session: Any, gradients: Any) -> Any:
        seen.append([source for batch in gradients.batches for source in batch.sources])
        return update(session, gradients)

    monkeypatch.setattr(step_module, "_update", noting)
    return seen


class Faulty(Sft):
    """Out of memory in the forward pass, from its n-th micro-batch on, so many times."""

    def __init__(self, start: int, times: int) -> None:
        self.start, self.times = start, times

    def loss(self, loaded: Any, batch: Any) -> Any:
        part = super().loss(loaded, batch)
        self.start -= 1
        if self.start < 0 < self.times:
            self.times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return part


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


def test_fault_10_other_batch_size(tmp_path: Path, job_in, applied) -> None:  # noqa: F811
    """The same samples in the same order; the difference is rounding, and the log says so."""
    train(job_in(tmp_path / "a", loop={"batch_size": 1, "accumulation_steps": 4}))
    straight = list(applied)
    applied.clear()
    train(job_in(tmp_path / "b", loop={"batch_size": 1, "accumulation_steps": 4}))
    applied.clear()
    loop = {"batch_size": 4, "accumulation_steps": 1}
    job = job_in(tmp_path / "b", loop=loop, run={"resume": "checkpoint-9", "save_steps": 3})
    train(job)
    assert applied == straight[9:]
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    assert "--batch_size changed from 1 to 4: accepted (same samples in each step; results differ by rounding only" in (
        said(job)
    )


def test_fault_13_out_of_memory_at_step_k(tmp_path: Path, job_in, applied) -> None:  # noqa: F811
    """The step is done again from the same state in smaller pieces: nothing starts over, no sample is lost."""
    loop = {"batch_size": 4, "accumulation_steps": 2, "learning_rate": 2e-3}
    train(job_in(tmp_path / "a", loop=loop))
    straight = list(applied)
    applied.clear()
    # in the second micro-batch of the step, when the first has left its gradients; and once more when it is repeated
    job = job_in(tmp_path / "b", loop=loop, method=Faulty(start=3, times=2))
    result = train(job)
    assert applied == straight
    assert result.steps == len(straight) == 6
    assert losses(tmp_path / "b") == pytest.approx(losses(tmp_path / "a"), rel=1e-5)
    for before, after in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert [before[key] for key in ("step", "lr", "tokens")] == [after[key] for key in ("step", "lr", "tokens")]
    assert said(job).count("out of memory in step 2 with") == 2


def test_fault_14_out_of_memory_with_one_sample(tmp_path: Path, job_in) -> None:  # noqa: F811
    """What can be given up is; then the run stops with what is left to do, and goes on when there is room again."""
    loop = {"batch_size": 2, "accumulation_steps": 2}
    train(job_in(tmp_path / "a", loop=loop))
    job = job_in(tmp_path / "b", loop=loop, method=Faulty(start=8, times=99))  # from step 5 on
    with pytest.raises(UserError) as error:
        train(job)
    text = str(error.value)
    for words in (
        "Out of memory in step 5 with 1 sample of", "tokens in a micro-batch", "train.jsonl:", "computed again",
        "a shorter --max_seq_length (such as", "--quantization_bit 4", "--optimizer paged_adamw_8bit",
        "start anew with --overwrite", "Earlier checkpoints are intact",
    ):  # fmt: skip
        assert words in text
    assert not (tmp_path / "b" / "final_adapter").exists()
    train(job_in(tmp_path / "b", loop=loop, run={"resume": "auto"}))
    names = [tmp_path / name / "final_adapter" / "adapter_model.safetensors" for name in ("a", "b")]
    assert sha256(names[0]) == sha256(names[1])


def test_fault_15_killed_by_the_kernel(random_model_dir: Path, tmp_path: Path) -> None:
    """SIGKILL says nothing and saves nothing: the parent sees it, the next start tells and ends with the same bits.

    Where the kernel refuses memory instead of killing (RLIMIT_AS), the step is done again in smaller pieces.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("memory_children.py")), str(random_model_dir), str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    ends, text = found["ends"], found["said"]
    assert ends == {
        "straight": "exit 0", "killed": "killed, signal 9", "killed again": "exit 0", "roomy": "exit 0",
        "limited": "exit 0",
    }, text  # fmt: skip
    assert found["same_bits"]
    assert found["losses"]["killed"] == found["losses"]["straight"]
    assert "The run ended without saving, 1 step after checkpoint-4 (" in text["killed again"]
    assert "killed with signal 9, as the kernel does when memory runs out" in text["killed again"]
    assert "Resumed from" in text["killed again"]
    assert "out of memory in step 1 with 12 samples of" in text["limited"]
    assert "out of memory" not in text["roomy"]
    assert found["losses"]["limited"] == pytest.approx(found["losses"]["roomy"], rel=1e-5)
