"""What only a GPU shows: 16-bit precision, the loss scaler, pageable optimizer state, recomputed activations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from curve_noise import MOST, against_noise, handbook
from training_jobs import make_job, pairs, samples

from unsloth_factory.config.settings import ModelSettings, RunSettings, TuningSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.model.load import load_model
from unsloth_factory.run.atomic import sha256
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training.checkpoints.store import claim
from unsloth_factory.training.job import TrainResult
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo, LossSum, Sft

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# 64 x 2,048 values a matrix: bitsandbytes keeps moments in pageable memory from 100,000 on
TUNING = TuningSettings(lora_r=2048, quantization_bit=4)


def run(
    folder: Path, model: Path, dtype: torch.dtype, resume: str | None = None, engine: str = "standard", **changes: Any
) -> TrainResult:
    loaded = load_model(
        ModelSettings(model=str(model), engine=engine),
        quantization_bit=4,
        dtype=dtype,
        for_training=True,
        tuning=TUNING,
    )
    settings = RunSettings(**{"save_steps": 3, "save_total_limit": 9, "resume": resume} | changes.pop("run", {}))
    with claim(RunFolder(folder), settings) as store:
        return train(make_job(folder, loaded, store, tuning=TUNING, **changes))


def curve(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> str:
    return sha256(folder / "final_adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["adamw", "paged_adamw_8bit"])
def test_resume_on_a_gpu(random_model_dir: Path, tmp_path: Path, dtype: torch.dtype, optimizer: str) -> None:
    changes = {"loop": {"optimizer": optimizer}}
    run(tmp_path / "a", random_model_dir, dtype, **changes)
    before = adapter(tmp_path / "a")
    losses = curve(tmp_path / "a")
    result = run(tmp_path / "a", random_model_dir, dtype, resume="checkpoint-3", **changes)
    assert result.resumed_from == 3
    assert curve(tmp_path / "a") == pytest.approx(losses, rel=1e-3)
    assert adapter(tmp_path / "a") == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fast_engines_curve(random_model_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    for engine in ("standard", "fast"):
        run(tmp_path / engine, random_model_dir, dtype, engine=engine, run={"eval_steps": 2})
    assert curve(tmp_path / "fast") == pytest.approx(curve(tmp_path / "standard"), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_200_steps_differ_no_more_than_rounding_does(tiny_model_dir: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """The noise: `standard` again with all samples of a step in one row, and with padded rows."""
    # cut, as the fast engine's always are, in other ways: the same samples in each step, the same loss but for rounding
    ways: dict[str, dict[str, Any]] = {
        "reference": {},
        "one row": {"batch_size": 4, "accumulation_steps": 1},
        "padded": {"no_packing": True},
        "fast": {},
    }
    curves, tuning = {}, TuningSettings(lora_r=16)
    for name, changes in ways.items():
        loaded = load_model(
            ModelSettings(model=str(tiny_model_dir), engine="fast" if name == "fast" else "standard"),
            quantization_bit=4, dtype=dtype, for_training=True, tuning=tuning,
        )  # fmt: skip
        items = handbook(ChatTemplate.from_tokenizer(loaded.tokenizer))
        loop = {"max_steps": 200, "learning_rate": 1e-4} | changes
        with claim(RunFolder(tmp_path / name), RunSettings(save_steps=1000, logging_steps=1000)) as store:
            train(make_job(tmp_path / name, loaded, store, tuning=tuning, train_items=items, held_out=[], loop=loop))
        curves[name] = curve(tmp_path / name)
    found = against_noise(curves["fast"], curves["reference"], [curves["one row"], curves["padded"]])
    print(dtype, found)
    assert found["learned"] < 0.5
    assert max(found["all"], found["last"]) <= MOST


def test_the_fast_engine_resumes(random_model_dir: Path, tmp_path: Path) -> None:
    run(tmp_path / "a", random_model_dir, torch.bfloat16, engine="fast")
    losses = curve(tmp_path / "a")
    result = run(tmp_path / "a", random_model_dir, torch.bfloat16, resume="checkpoint-3", engine="fast")
    assert result.resumed_from == 3
    assert curve(tmp_path / "a") == pytest.approx(losses, rel=1e-3)


def test_dpo_by_the_fast_engine(random_model_dir: Path, tmp_path: Path) -> None:
    for engine in ("standard", "fast"):
        run(tmp_path / engine, random_model_dir, torch.bfloat16, engine=engine, method=Dpo(), train_items=pairs(18))
    assert curve(tmp_path / "fast") == pytest.approx(curve(tmp_path / "standard"), abs=1e-2)


def test_padded_is_packed(random_model_dir: Path, tmp_path: Path) -> None:
    for name, no_packing in (("packed", False), ("padded", True)):
        run(tmp_path / name, random_model_dir, torch.bfloat16, loop={"no_packing": no_packing})
    assert curve(tmp_path / "packed") == pytest.approx(curve(tmp_path / "padded"), rel=2e-2)


def test_dpo_starts_at_log_two(random_model_dir: Path, tmp_path: Path) -> None:
    run(tmp_path, random_model_dir, torch.float16, method=Dpo(), train_items=pairs(8))
    assert curve(tmp_path)[0] == pytest.approx(math.log(2), abs=1e-3)


def test_overflow_is_the_scalers_business(random_model_dir: Path, tmp_path: Path) -> None:
    class Loud(Sft):
        """A gradient that overflows float16 under the first loss scales."""

        def loss(self, loaded: Any, batch: Any) -> LossSum:
            part = super().loss(loaded, batch)
            return LossSum(part.total * 1e5, part.count)

    result = run(
        tmp_path,
        random_model_dir,
        torch.float16,
        method=Loud(),
        train_items=samples(40),
        loop={"max_steps": 24, "learning_rate": 1e-4},
    )
    assert result.scaler_skips > 0
    assert result.skipped_steps == 0
    assert result.steps - result.scaler_skips > 0
    state = json.loads((tmp_path / "checkpoint-24" / "state.json").read_text())
    assert 0 < state["scaler"]["scale"] < 65536
