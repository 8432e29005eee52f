"""What only a GPU shows about memory: its meter, pinned memory, the real allocator's refusal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_jobs import make_job, pairs, said, samples

from unsloth_factory.config.settings import ModelSettings, RunSettings, TuningSettings
from unsloth_factory.model.load import load_model
from unsloth_factory.run.atomic import sha256
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training import step
from unsloth_factory.training.checkpoints.store import claim
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory import offload
from unsloth_factory.training.memory.levers import Levers
from unsloth_factory.training.memory.meter import GIB, GpuMeter
from unsloth_factory.training.memory.probe import probe
from unsloth_factory.training.methods import Dpo, Sft
from unsloth_factory.training.reporting.progress import Progress
from unsloth_factory.training.session import open_session

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TUNING = TuningSettings(lora_r=8)


@pytest.fixture
def cap() -> Iterator[Any]:
    """cap(bytes): the process may use no more of the card."""

    def set_cap(limit: int) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])

    yield set_cap
    torch.cuda.set_per_process_memory_fraction(1.0)


def load(model: Path, tuning: TuningSettings = TUNING) -> Any:
    settings = ModelSettings(model=str(model))
    return load_model(
        settings, quantization_bit=tuning.quantization_bit, dtype=torch.bfloat16, for_training=True, tuning=tuning
    )


def job(folder: Path, loaded: Any, store: Any, **changes: Any) -> Any:
    return make_job(folder, loaded, store, tuning=changes.pop("tuning", TUNING), **changes)


def test_the_meter_heeds_a_cap(cap) -> None:
    meter = GpuMeter(torch.device("cuda", 0))
    held = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    assert meter.read().limit > 2 * GIB
    cap(GIB)
    reading = meter.read()
    assert held.nbytes <= reading.used <= reading.peak
    assert abs(reading.limit - GIB) < 2**21
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(GIB, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("method", [Sft, Dpo])
def test_levers_leave_the_gradients(random_model_dir: Path, tmp_path: Path, monkeypatch: Any, method: Any) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    items = samples(8) if method is Sft else pairs(8)
    found = []
    for number, levers in enumerate((Levers(), Levers(checkpointing=True), Levers(offload=True), Levers(None, None,
                                     None, True, True))):  # fmt: skip
        loaded = load(random_model_dir)
        with claim(RunFolder(tmp_path / str(number)), RunSettings()) as store:
            loop = {"no_gradient_checkpointing": True, "batch_size": 4}
            session = open_session(
                job(tmp_path / str(number), loaded, store, method=method(), train_items=items, loop=loop),
                Progress(None, 1),
            )
        for parameter in session.parameters:
            parameter.data.add_(0.01)
        session.state.levers = levers
        probe(session)
        loaded.model.train()
        assert isinstance(step._gradients(session, 0), step.Gradients)
        found.append([p.grad.clone() for p in session.parameters])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_a_probe_changes_no_bit(random_model_dir: Path, tmp_path: Path, optimizer: str) -> None:
    hashes = []
    tuning = TuningSettings(lora_r=2048, quantization_bit=4)  # so large that the 8-bit state is paged
    for probes in (False, True):
        folder = tmp_path / str(probes)
        loaded = load(random_model_dir, tuning)
        meter = GpuMeter(loaded.device)
        meter.probes = probes  # type: ignore[misc]
        with claim(RunFolder(folder), RunSettings(save_steps=3)) as store:
            made = job(folder, loaded, store, tuning=tuning, meter=meter, loop={"optimizer": optimizer, "max_steps": 4})
            train(made)
        assert ("longest micro-batch" in said(made)) == probes
        hashes.append(sha256(folder / "final_adapter" / "adapter_model.safetensors"))
    assert hashes[0] == hashes[1]


def test_the_real_allocator_refuses_and_the_run_goes_on(random_model_dir: Path, tmp_path: Path, cap) -> None:
    rows = samples(16, longest=900)
    results = {}
    for name in ("plain", "capped"):
        loaded = load(random_model_dir)
        with claim(RunFolder(tmp_path / name), RunSettings(save_steps=99, eval_steps=2)) as store:
            loop = {"max_steps": 3, "batch_size": 8, "accumulation_steps": 1, "no_gradient_checkpointing": True}
            made = job(tmp_path / name, loaded, store, train_items=rows, eval_items=samples(3, 9, 900), loop=loop)
            if name == "capped":
                cap(torch.cuda.memory_allocated() + int(0.5 * (results["peak"] - torch.cuda.memory_allocated())))
            results[name] = train(made)
        results["peak"] = torch.cuda.max_memory_allocated()
    assert "out of GPU memory before step 1" in said(made)
    assert results["capped"].steps == 3
    assert results["capped"].final_loss == pytest.approx(results["plain"].final_loss, rel=1e-2)
