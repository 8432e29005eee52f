"""--engine auto: where it takes the fast engine, why it does not, and what happens when kernels compute nonsense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.kernels import launch, swiglu
from unsloth_factory.model import engine, load
from unsloth_factory.model.fast import self_check
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel

GPU = torch.device("cuda", 0)


def chosen(folder: Path, requested: str = "auto", **changes: Any) -> tuple[str, str]:
    tuning = TuningSettings(**changes.pop("tuning", {}))
    given: dict[str, Any] = {"device": GPU, "adapter": None, "quantized": True, "prefers": "fast"} | changes
    return engine.choose_engine(requested, folder, tuning, **given)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_triton")
def test_auto_takes_the_fast_engine_where_it_can(random_model_dir: Path) -> None:
    name, reason = chosen(random_model_dir)
    assert name == "fast"
    assert "checked on this GPU" in reason


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"prefers": "standard"}, "transformers, peft and bitsandbytes"),
        ({"device": torch.device("cpu")}, "without a GPU"),
        (
            {"tuning": {"finetuning_type": "full"}},
            "not measured with --finetuning_type full yet",
        ),
    ],
)
def test_auto_says_why_not(random_model_dir: Path, changes: dict[str, Any], why: str) -> None:
    name, reason = chosen(random_model_dir, **changes)
    assert name == "standard"
    assert why in reason


def test_auto_says_why_not_on_this_machine(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert chosen(random_model_dir) == ("standard", chosen(random_model_dir)[1])
    assert "several processes" in chosen(random_model_dir)[1]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(engine.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in chosen(random_model_dir)[1]


@pytest.mark.usefixtures("with_triton")
def test_an_adapter_of_another_kind(random_model_dir: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"use_dora": True}))
    assert "use_dora" in chosen(random_model_dir, adapter=adapter)[1]
    with pytest.raises(UserError, match="cannot run .*use_dora"):
        chosen(random_model_dir, "fast", adapter=adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"use_dora": False, "lora_dropout": 0.1}))
    assert chosen(random_model_dir, adapter=adapter)[0] == "fast"


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("changes", [{"model_type": "of_tomorrow"}, {"model_type": None}, {"rope_parameters": 3}])
def test_a_model_that_transformers_does_not_know_is_left_to_standard(
    random_model_dir: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    config = json.loads((random_model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    name, reason = chosen(tmp_path)
    assert name == "standard"
    assert "the fast engine cannot run" in reason


def test_memory_that_runs_out_in_the_look_is_said(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(decoder: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load, "_on_a_gpu", lambda loaded: True)
    monkeypatch.setattr(self_check, "problem", full)
    with pytest.raises(UserError, match="does not fit on cpu"):
        load_model(ModelSettings(model=str(random_model_dir), engine="fast"), quantization_bit=4, for_training=True)


# --- the look at what this machine's kernels compute


KINDS = [{}, {"lora_dropout": 0.2}, {"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_last_n": 1}]


def fast(folder: Path, **tuning: Any) -> LoadedModel:
    return load_model(
        ModelSettings(model=str(folder), engine="fast"), quantization_bit=None if "finetuning_type" in tuning else 4,
        dtype=torch.float32, for_training=True, tuning=TuningSettings(**tuning),
    )  # fmt: skip


@pytest.mark.parametrize("tuning", KINDS)
def test_sound_kernels_leave_no_trace(random_model_dir: Path, tuning: dict[str, Any]) -> None:
    loaded = fast(random_model_dir, **tuning)
    decoder = loaded.decoder
    before = [place.clone() for place in decoder.adapter.snapshot()]
    ids, positions = torch.arange(5, 25)[None], torch.arange(20)[None]
    with torch.no_grad():
        hidden = loaded.hidden_states(ids, positions, None)
        assert self_check.problem(decoder) is None
        assert torch.equal(loaded.hidden_states(ids, positions, None), hidden)
    assert all(torch.equal(a, b) for a, b in zip(decoder.adapter.snapshot(), before, strict=True))
    assert decoder.planner.forced is None


def _wrong_on_the_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a kernel compute something else than its twin does."""
    right = getattr(swiglu, name)

    def wrong(*args: Any) -> torch.Tensor:
        result = right(*args)
        return result if launch._only_twins else result.mul_(1.1)

    monkeypatch.setattr(swiglu, name, wrong)


@pytest.mark.parametrize(("kernel", "what"), [("swiglu", "output"), ("swiglu_backward", "gradient 0 in down")])
@pytest.mark.parametrize("tuning", KINDS)
def test_a_wrong_kernel_is_noticed(
    random_model_dir: Path, monkeypatch: pytest.MonkeyPatch, tuning: dict[str, Any], kernel: str, what: str
) -> None:
    loaded = fast(random_model_dir, **tuning)
    _wrong_on_the_gpu(kernel, monkeypatch)
    assert f"the {what} of a layer is off by" in str(self_check.problem(loaded.decoder))


def test_a_kernel_that_does_not_compile_is_a_reason(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = fast(random_model_dir)

    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("ptxas: unsupported architecture\nmore")

    monkeypatch.setattr(swiglu, "swiglu", broken)
    assert self_check.problem(loaded.decoder) == "RuntimeError: ptxas: unsupported architecture"


def test_what_follows_from_a_wrong_kernel(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name: an end with the way out. Picked by auto: the standard engine, and the reason."""
    settings = ModelSettings(model=str(random_model_dir), engine="auto")
    picked = {"standard": ("standard", "asked for")}
    monkeypatch.setattr(load, "choose_engine", lambda asked, *a, **k: picked.get(asked, ("fast", "picked")))
    monkeypatch.setattr(load, "_on_a_gpu", lambda loaded: True)
    monkeypatch.setattr(self_check, "problem", lambda decoder: "sums are wrong")
    loaded = load_model(settings, quantization_bit=4, for_training=True, prefers="fast")
    assert loaded.engine == "standard"
    assert "does not work on this machine: sums are wrong" in loaded.engine_reason
    with pytest.raises(UserError, match=r"--engine fast does not work on cpu: sums are wrong\. Use --engine standard"):
        load_model(ModelSettings(model=str(random_model_dir), engine="fast"), quantization_bit=4, for_training=True)


def test_a_run_goes_on_with_the_engine_it_began_with(tmp_path: Path) -> None:
    from unsloth_factory.config.settings import RunSettings
    from unsloth_factory.training.checkpoints.store import CheckpointStore

    store = CheckpointStore(tmp_path, RunSettings(), print)
    assert store.newest_engine() is None
    for step, state in ((1, {"fingerprint": {}}), (2, {"fingerprint": {"engine": "fast"}})):
        store.path(step).mkdir()
        (store.path(step) / "state.json").write_text(json.dumps(state))
    assert store.newest_engine() == "fast"
    for damaged in ("[]", "{}", '{"fingerprint": 3}', "{"):
        (store.path(2) / "state.json").write_text(damaged)
        assert store.newest_engine() == "standard"  # the one before it
    shutil.rmtree(store.path(2))
    assert store.newest_engine() == "standard"
