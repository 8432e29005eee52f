"""The fast engine in the training loop: the curve of the standard engine, its checkpoints and its adapter files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_jobs import CPU, pairs

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo


def loaded(folder: Path, engine: str, adapter: Path | None = None, **tuning: Any) -> Any:
    settings = TuningSettings(lora_r=4, **tuning)
    return load_model(
        ModelSettings(model=str(folder), engine=engine, adapter=str(adapter) if adapter else None),
        quantization_bit=settings.quantization_bit,
        dtype=torch.float32,
        for_training=True,
        tuning=settings,
        device=CPU,
    )


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "final_adapter" / "adapter_model.safetensors").read_bytes()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("changes", [{}, {"loop": {"no_packing": True}}, {"method": Dpo(), "train_items": pairs(18)}])
@pytest.mark.parametrize("bits", [None, 4])
def test_the_curve_is_that_of_the_standard_engine(tmp_path, job_in, random_model_dir, changes, bits):
    for engine in ("standard", "fast"):
        model = loaded(random_model_dir, engine, quantization_bit=bits)
        train(job_in(tmp_path / engine, loaded=model, **changes))
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "standard"), rel=2e-4)
    files = [sorted(p.name for p in (tmp_path / engine / "final_adapter").iterdir()) for engine in ("standard", "fast")]
    assert files[0] == files[1]


@pytest.mark.parametrize("changes", [{}, {"method": Dpo(), "train_items": pairs(18)}])
def test_samples_put_together_change_nothing_but_rounding(tmp_path, job_in, random_model_dir, changes, monkeypatch):
    seen: dict[str, list[int]] = {"given": [], "merged": []}
    for name, budget in (("given", None), ("merged", 150)):
        monkeypatch.setattr(LoadedModel, "token_budget", property(lambda _, budget=budget: budget))
        job = job_in(tmp_path / name, loaded=loaded(random_model_dir, "fast"), **changes)
        loss = job.method.loss
        job.method.loss = lambda model, batch, name=name, loss=loss: (
            seen[name].append(len(batch.sources)),
            loss(model, batch),
        )[1]
        train(job)
        job.method.loss = loss
    assert losses(tmp_path / "merged") == pytest.approx(losses(tmp_path / "given"), rel=1e-4)
    assert max(seen["merged"]) > max(seen["given"])
    state = json.loads(next((tmp_path / "merged").rglob("state.json")).read_text())
    assert state["loop"]["merged_tokens"] == 150


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.0), ("adamw_8bit", 0.0), ("adamw", 0.2)])
def test_it_resumes_with_the_same_bits(tmp_path, job_in, random_model_dir, optimizer, rate):
    changes = {"loop": {"optimizer": optimizer}}
    model = loaded(random_model_dir, "fast", lora_dropout=rate)
    job = job_in(tmp_path, loaded=model, run={"save_total_limit": 9}, **changes)
    train(job)
    assert len(job.loaded.optimized_parameters()) == 1
    before, curve = adapter_bytes(tmp_path), losses(tmp_path)
    train(
        job_in(
            tmp_path,
            loaded=loaded(random_model_dir, "fast", lora_dropout=rate),
            run={"resume": "checkpoint-3", "save_total_limit": 9},
            **changes,
        )
    )
    assert adapter_bytes(tmp_path) == before
    assert losses(tmp_path) == curve


def test_dropout_changes_the_curve_and_not_the_evaluation(tmp_path, job_in, random_model_dir):
    curves = []
    for rate in (0.0, 0.5):
        folder = tmp_path / str(rate)
        model = loaded(random_model_dir, "fast", lora_dropout=rate)
        train(job_in(folder, loaded=model, run={"eval_steps": 2}))
        curves.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
        ids = torch.arange(5, 25)[None]
        with torch.no_grad():
            same = [model.hidden_states(ids, torch.arange(20)[None], None) for _ in range(2)]
        assert torch.equal(*same)
    plain, dropped = curves
    assert plain[0]["loss"] == dropped[0]["loss"]  # B is 0 at first
    assert all(a["loss"] != b["loss"] for a, b in zip(plain[1:], dropped[1:], strict=True))
    assert dropped[-1]["loss"] < dropped[0]["loss"] - 0.2
    assert json.loads((tmp_path / "0.5" / "final_adapter" / "adapter_config.json").read_text())["lora_dropout"] == 0.5


def test_another_engine_is_named_on_resume(tmp_path, job_in, random_model_dir):
    train(job_in(tmp_path, loaded=loaded(random_model_dir, "fast")))
    with pytest.raises(UserError, match="--engine: was fast, now standard"):
        train(job_in(tmp_path, loaded=loaded(random_model_dir, "standard"), run={"resume": "auto"}))


def test_a_matrix_that_was_given_other_memory(random_model_dir):
    model = loaded(random_model_dir, "fast")
    flat, matrix = model.optimized_parameters()[0], model.trainable_parameters()[3]
    matrix.data = torch.full_like(matrix, 0.25)
    model.model.train()
    model.hidden_states(torch.arange(5, 25)[None], torch.arange(20)[None], None).sum().backward()
    assert float((flat == 0.25).sum()) == matrix.numel()
    flat.data += 1.0
    assert torch.equal(matrix, torch.full_like(matrix, 1.25))
    norms = [torch.stack([p.grad.norm() for p in group]).norm() for group in ([flat], model.trainable_parameters())]
    assert torch.allclose(*norms)


def test_its_adapter_goes_into_the_other_engine(tmp_path, job_in, random_model_dir):
    train(job_in(tmp_path / "fast", loaded=loaded(random_model_dir, "fast")))
    ids = torch.arange(5, 25)[None]
    hidden = []
    for engine in ("standard", "fast"):
        model = loaded(random_model_dir, engine, adapter=tmp_path / "fast" / "final_adapter")
        with torch.no_grad():
            hidden.append(model.hidden_states(ids, torch.arange(20)[None], None))
    assert torch.allclose(*hidden, atol=1e-4)


TUNINGS = [{"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_last_n": 1}]


@pytest.mark.parametrize("tuning", TUNINGS)
def test_the_curve_of_trained_weights_is_that_of_the_standard_engine(tmp_path, job_in, random_model_dir, tuning):
    files = {}
    for engine in ("standard", "fast"):
        model = loaded(random_model_dir, engine, **tuning)
        rate = {"learning_rate": 1e-3}
        train(job_in(tmp_path / engine, loaded=model, tuning=TuningSettings(**tuning), loop=rate))
        files[engine] = load_file(tmp_path / engine / "final_model" / "model.safetensors")
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "standard"), rel=2e-4)
    base = load_file(random_model_dir / "model.safetensors")
    assert files["fast"].keys() == files["standard"].keys() == base.keys()
    for name, tensor in files["standard"].items():
        assert torch.allclose(files["fast"][name].float(), tensor.float(), atol=2e-3), name
        trains = tuning["finetuning_type"] == "full" or "layers.1." in name
        moved = (files["fast"][name].float() - base[name].to(tensor.dtype).float()).abs().max()
        assert (moved > 0) == trains, name


@pytest.mark.parametrize("tuning", TUNINGS)
def test_trained_weights_resume_with_the_same_bits(tmp_path, job_in, random_model_dir, tuning):
    def job(**run: Any) -> Any:
        model = loaded(random_model_dir, "fast", **tuning)
        return job_in(
            tmp_path, loaded=model, tuning=TuningSettings(**tuning), loop={"learning_rate": 1e-3},
            run={"save_total_limit": 9, **run},
        )  # fmt: skip

    train(job())
    path = tmp_path / "final_model" / "model.safetensors"
    before, curve = path.read_bytes(), losses(tmp_path)
    train(job(resume="checkpoint-3"))
    assert path.read_bytes() == before
    assert losses(tmp_path) == curve


def test_what_it_cannot_do_is_refused(random_model_dir):
    with pytest.raises(UserError, match="the model has 2 layers. Give at most 2"):
        loaded(random_model_dir, "fast", finetuning_type="freeze", freeze_last_n=3)
    with pytest.raises(UserError, match="cannot train themselves"):
        loaded(random_model_dir, "fast", finetuning_type="full", quantization_bit=4)
