"""Rows 4 to 7, 11, 12, 16, 18 and 19 of the table of faults: what happens to a training."""

from __future__ import annotations

import errno
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "commands")]

from command_line import uf  # noqa: E402
from training_jobs import job_in, metrics, said, samples, stopping, weights  # noqa: E402, F401

from unsloth_factory.config.errors import Stopped, UserError  # noqa: E402
from unsloth_factory.config.settings import RunSettings, TuningSettings  # noqa: E402
from unsloth_factory.model import device as device_module  # noqa: E402
from unsloth_factory.model.device import pick_device_dtype  # noqa: E402
from unsloth_factory.run.folder import RunFolder  # noqa: E402
from unsloth_factory.training import session as session_module  # noqa: E402
from unsloth_factory.training.checkpoints import store as checkpoint_module  # noqa: E402
from unsloth_factory.training.checkpoints import tensors  # noqa: E402
from unsloth_factory.training.checkpoints.store import CheckpointStore, claim, damage  # noqa: E402
from unsloth_factory.training.loop import train  # noqa: E402
from unsloth_factory.training.methods import LossSum, Sft  # noqa: E402
from unsloth_factory.training.reporting.announce import PRECISION_TEXT  # noqa: E402


@pytest.fixture
def two_checkpoints(tmp_path: Path, job_in) -> Path:  # noqa: F811
    """A run that was stopped with checkpoints 3 and 5 of 10."""
    with pytest.raises(Stopped):
        train(job_in(tmp_path / "run", method=stopping(Sft(), 9)))
    return tmp_path / "run"


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def test_fault_04_truncated_checkpoint(two_checkpoints: Path, job_in) -> None:  # noqa: F811
    """Each file of the newest checkpoint cut to nothing, to half, by one byte: named, skipped, the older one taken."""
    straight = job_in(two_checkpoints.parent / "straight")
    train(straight)
    told: list[str] = []
    store = CheckpointStore(two_checkpoints, RunSettings(resume="auto"), told.append)
    for path in files_of(store.path(5)):
        whole = path.read_bytes()
        for part in (b"", whole[: len(whole) // 2], whole[:-1]):
            path.write_bytes(part)
            found = store.to_resume()
            assert found is not None
            assert found.step == 3
            assert "checkpoint-5 is damaged and is skipped" in told[-1]
            assert path.name in told[-1]
        path.write_bytes(whole)
    assert len(files_of(store.path(5))) >= 6
    (store.path(5) / "optimizer.safetensors").write_bytes(b"")
    job = job_in(two_checkpoints, run={"resume": "auto"})
    assert train(job).resumed_from == 3
    assert weights(job) == weights(straight)


def test_fault_05_flipped_byte(two_checkpoints: Path) -> None:
    """One byte changed at each of 200 random offsets of a real checkpoint: all are seen."""
    newest, chooser = two_checkpoints / "checkpoint-5", random.Random(5)
    files = files_of(newest)
    sizes = [path.stat().st_size for path in files]
    seen = 0
    for _ in range(200):
        path = chooser.choices(files, sizes)[0] if chooser.random() < 0.5 else chooser.choice(files)
        offset, mask = chooser.randrange(path.stat().st_size), 1 << chooser.randrange(8)
        with open(path, "r+b") as file:
            for _ in range(2):  # there and back
                file.seek(offset)
                byte = file.read(1)[0]
                file.seek(offset)
                file.write(bytes([byte ^ mask]))
                file.flush()
                seen += damage(newest) is not None
    assert seen == 200  # and none after the byte was put back
    assert damage(newest) is None


def test_fault_06_all_checkpoints_damaged(two_checkpoints: Path, job_in) -> None:  # noqa: F811
    """Refused; the run never starts again at step 0 by itself, and nothing is deleted."""
    for step in (3, 5):
        with open(two_checkpoints / f"checkpoint-{step}" / "optimizer.safetensors", "r+b") as file:
            file.seek(100)
            file.write(b"?")
    before = metrics(job_in(two_checkpoints, run={"resume": "auto"}))
    job = job_in(two_checkpoints, run={"resume": "auto"})
    with pytest.raises(UserError, match="All checkpoints of .* are damaged.*start again at step 0 with --overwrite"):
        train(job)
    assert said(job).count("is damaged and is skipped: optimizer.safetensors") == 2
    assert metrics(job) == before
    assert job.store.steps() == [3, 5]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB; skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class Filling(Sft):
    """SFT beside something that fills the disk in its n-th micro-batch."""

    def __init__(self, ballast: Path, call: int) -> None:
        self.ballast, self.call, self.calls = ballast, call, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        if self.calls == self.call:
            with open(self.ballast, "wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(4096))
                    except OSError:
                        break
        return super().loss(loaded, batch)


@pytest.mark.parametrize("foreseen", [True, False])
def test_fault_07_disk_full_at_checkpoint(
    small_disk: Path,
    tmp_path: Path,
    job_in,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    foreseen: bool,
) -> None:
    """A real disk that fills up: the run stops and says so, the last checkpoint is whole, and freed it goes on."""
    straight = job_in(tmp_path / "straight")
    train(straight)
    if not foreseen:  # the check before the write passed, and then another program took the space
        monkeypatch.setattr(checkpoint_module, "require_free_space", lambda *_: None)
    run, ballast = small_disk / "run", small_disk / "ballast"
    with pytest.raises(
        UserError, match="Disk full: .*checkpoint-3 is intact: free some space and continue with --resume auto"
    ):
        train(job_in(run, method=Filling(ballast, 9)))
    assert damage(run / "checkpoint-3") is None
    assert sorted(path.name for path in run.glob("*checkpoint*")) == ["checkpoint-3"]
    ballast.unlink()
    job = job_in(run, run={"resume": "auto"})
    assert train(job).resumed_from == 3
    assert weights(job) == weights(straight)
    assert metrics(job) == metrics(straight)


def test_fault_07_simulated(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where no file system can be mounted: the write of a file fails half-way."""
    plain = tensors.save_file
    saves = []

    def fills_up(values: Any, path: Path, **rest: Any) -> None:
        saves.append(path)
        if len(saves) > 3:  # the second checkpoint's second file
            Path(path).write_bytes(b"torn")
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(values, path, **rest)

    monkeypatch.setattr(tensors, "save_file", fills_up)
    with pytest.raises(UserError, match="Disk full: checkpoint-6 .*checkpoint-3 is intact"):
        train(job_in(tmp_path))
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir() if "-" in path.name) == ["checkpoint-3"]
    job = job_in(tmp_path, run={"resume": "auto"})
    assert train(job).resumed_from == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("data", r"training samples \(SHA-256\): was \w+, now \w+"),
        ("seed", "--seed: was 3407, now 1"),
        ("base", r"base model \(fingerprint\): was \w+, now another"),
        ("template", r"chat template \(SHA-256\): was \w+, now other"),
        ("rank", "--lora_r: was 4, now 8"),
    ],
)
def test_fault_11_changed_settings(two_checkpoints: Path, job_in, changed: str, message: str) -> None:  # noqa: F811
    """Refused by name, with the ways out, before anything is written."""
    changes: dict[str, Any] = {
        "data": {"train_items": samples(18, seed=1)},
        "seed": {"loop": {"seed": 1}},
        "rank": {"tuning": TuningSettings(lora_r=8)},
    }.get(changed, {})
    before = (two_checkpoints / "metrics.jsonl").read_bytes()
    job = job_in(two_checkpoints, run={"resume": "auto"}, **changes)
    if changed == "base":
        job.loaded.fingerprint = "another"
    if changed == "template":
        job.template.sha256 = "other"
    with pytest.raises(UserError, match=message) as refused:
        train(job)
    assert "give the old values, and the run goes on" in str(refused.value)
    assert "--overwrite" in str(refused.value)
    assert (two_checkpoints / "metrics.jsonl").read_bytes() == before
    assert job.store.steps() == [3, 5]


def test_fault_12_two_runs_in_one_folder(tmp_path: Path) -> None:
    """The second one is refused by the command line before it reads anything."""
    with claim(RunFolder(tmp_path / "run"), RunSettings()):
        outcome = uf("sft", "--model", "tiny", "--dataset", "no-such-file.csv", "--output_dir", tmp_path / "run")
    assert outcome.code == 1
    assert "is in use by another training. Wait for it, or give --output_dir another folder." in outcome.words


class Spoilt(Sft):
    """SFT whose loss is multiplied by something in some micro-batches, numbered from 1."""

    def __init__(self, calls: range, factor: float) -> None:
        self.bad, self.factor, self.calls = calls, factor, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        return LossSum(part.total * (self.factor if self.calls in self.bad else 1.0), part.count)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_fault_16_nan_loss(tmp_path: Path, job_in, factor: float) -> None:  # noqa: F811
    """Not applied, its samples named; where it stays, the run stops, and nothing that is not finite is ever saved."""
    job = job_in(tmp_path / "once", method=Spoilt(range(5, 6), factor))
    assert train(job).skipped_steps == 1
    assert "step 3: loss" in said(job)
    assert "Samples: train.jsonl:" in said(job)
    assert finite(job.folder.final_adapter / "adapter_model.safetensors")
    job = job_in(tmp_path / "always", method=Spoilt(range(9, 10_000), factor), loop={"max_steps": 40})
    with pytest.raises(UserError, match="10 steps in a row"):
        train(job)
    assert not job.folder.final_adapter.exists()
    assert all(finite(path) for path in job.folder.path.glob("checkpoint-*/adapter/*.safetensors"))


def finite(path: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())


class ScaledOnCpu(Accelerator):
    """accelerate's float16 mode, which wants a GPU, around the CPU's loss scaler."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"mixed_precision": "no"})
        self.scaler = torch.amp.GradScaler("cpu")
        self.native_amp = True

    @property
    def mixed_precision(self) -> str:
        return "fp16"


class Float16Gradients(Sft):
    """The gradient passes through float16, where it overflows under the first loss scales (65536 * 1000 / tokens)."""

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        part = super().loss(loaded, batch)
        return LossSum(part.total.to(torch.float16).float() * 1000, part.count)


def test_fault_18_fp16_overflow(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The scaler skips and halves until it fits; the adapter stays float32; a resumed run keeps the scale."""
    monkeypatch.setattr(session_module, "Accelerator", ScaledOnCpu)
    loop = {"max_steps": 20, "learning_rate": 1e-4}
    job = job_in(tmp_path / "straight", method=Float16Gradients(), loop=loop)
    result = train(job)
    assert 3 <= result.scaler_skips <= 12
    assert (result.skipped_steps, result.rewound) == (0, False)
    assert f"the float16 loss scaler skipped {result.scaler_skips} of 20 steps" in said(job)
    assert {parameter.dtype for parameter in job.loaded.trainable_parameters()} == {torch.float32}
    state = json.loads((job.folder.path / "checkpoint-20" / "state.json").read_text())
    assert state["scaler"]["scale"] == 65536 / 2**result.scaler_skips
    with pytest.raises(Stopped):
        train(job_in(tmp_path / "run", method=stopping(Float16Gradients(), 23), loop=loop))
    resumed = job_in(tmp_path / "run", method=Float16Gradients(), loop=loop, run={"resume": "auto"})
    assert train(resumed).scaler_skips == result.scaler_skips
    assert weights(resumed) == weights(job)


def test_fault_19_bf16_on_a_t4(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The compute capability decides, whatever torch claims and a settings file asks: float16 with the scaler."""
    cuda = device_module.torch.cuda
    for name, value in (
        ("is_available", True), ("device_count", 1), ("get_device_capability", (7, 5)), ("get_device_name", "Tesla T4"),
        ("is_bf16_supported", True),
    ):  # fmt: skip
        monkeypatch.setattr(cuda, name, lambda *_arguments, value=value: value)
    _, dtype, reason = pick_device_dtype()
    assert dtype == torch.float16
    assert "Tesla T4 (compute capability 7.5) has no bfloat16 units" in reason
    assert "float16 with loss scaling" in PRECISION_TEXT[session_module.PRECISIONS[dtype]]
    (tmp_path / "job.yaml").write_text("bf16: true\n")
    outcome = uf("sft", tmp_path / "job.yaml")
    assert "bf16: no effect, precision follows the card's compute capability" in outcome.words
