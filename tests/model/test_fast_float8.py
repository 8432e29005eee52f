"""Products of the fast engine in float8: as far off as 3 bits of mantissa make them, and said aloud."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.model.fast import cost, self_check
from unsloth_factory.model.fast.linear import FusedLinear, LoraPair, Part
from unsloth_factory.model.fast.quantize import quantize, stack
from unsloth_factory.model.load import load_model
from unsloth_factory.training.checkpoints.resume import check_same

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fast_models import CPU, both, packed_inputs, run  # noqa: E402

K, PARTS = 128, (Part("one", 0, 96), Part("two", 96, 160))


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


def fused(float8: bool, bias: bool = False) -> FusedLinear:
    """Two NF4 projections of one input, with an adapter on each."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(part.stop - part.start, K, generator=generator) * 0.02 for part in PARTS]
    made = FusedLinear(
        stack([quantize(weight) for weight in weights]), torch.ones(160) if bias else None, PARTS, torch.float32
    )
    pairs = {
        part.name: LoraPair(
            torch.nn.Parameter(torch.randn(4, K, generator=generator)),
            torch.nn.Parameter(torch.randn(part.stop - part.start, 4, generator=generator)),
            0.5,
        )
        for part in PARTS
    }
    for shadow in made.attach(pairs):
        shadow.copy.copy_(shadow.source.detach() * shadow.factor)
    made.collect_in([torch.zeros(size) for size in made.flat_sizes])
    if float8:
        made.compute_in_float8()
    return made


def both_passes(one: FusedLinear, scale: float = 1.0, **options: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    wide, dwide = one.input(30), one.output(30)
    one.x_of(wide).copy_(torch.randn(30, K, generator=generator) * scale)
    one.y_of(dwide).copy_(torch.randn(30, 160, generator=generator))
    found = {"y": one.forward(wide, **options), "dx": one.input_gradient(dwide)}
    one.add_gradients(dwide, one.x_of(wide), one.t_of(wide))
    return found | {str(number): gradient for number, gradient in enumerate(one.gradients())}


def test_the_base_product_is_rounded_and_the_adapters_is_not():
    adapter = both_passes(fused(False))
    rounded = both_passes(fused(True))
    base = both_passes(fused(False), lora=False)["y"], both_passes(fused(True), lora=False)["y"]
    assert 0.01 < error(base[1], base[0]) < 0.045  # 2.6 % for each of two factors
    off = base[1] - base[0]
    assert torch.allclose(rounded["y"] - adapter["y"], off, atol=1e-3 * float(off.norm()))
    for name in ("0", "1", "2"):  # dt and t come of the adapter alone
        assert torch.allclose(rounded[name], adapter[name], rtol=1e-4, atol=1e-4)
    without = [both_passes(one)["dx"] for one in (fused(False), fused(True))]
    assert 0 < error(without[1], without[0]) < 0.045


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_the_size_of_the_input_changes_nothing(scale):
    exact, rounded = (both_passes(fused(float8), scale, lora=False)["y"] for float8 in (False, True))
    assert error(rounded, exact) < 0.045


def test_bias_residual_and_place():
    residual, out = torch.randn(30, 160), torch.zeros(30, 170)[:, :160]
    for options in ({"residual": residual}, {"residual": residual, "out": out}, {"out": out}, {}):
        for lora in (True, False):
            exact, rounded = (
                both_passes(fused(float8, bias="residual" not in options), lora=lora, **options)["y"].clone()
                for float8 in (False, True)
            )
            assert 0 < error(rounded, exact) < 0.045
    assert torch.equal(both_passes(fused(True), out=out)["y"], out)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_a_whole_model_is_near_the_exact_one(family_dir, family):
    _, fast = both(family_dir(family), bits=4)
    exact = run(fast, packed_inputs())
    decoder = fast.get_base_model().model
    for layer in decoder.stack:
        for projection in layer.projections.values():
            projection.compute_in_float8()
    rounded = run(fast, packed_inputs())
    assert 0.01 < error(rounded[0], exact[0]) < 0.15
    ours, theirs = (torch.cat([found[1][name].flatten() for name in sorted(exact[1])]) for found in (rounded, exact))
    assert float(torch.cosine_similarity(ours, theirs, dim=0)) > 0.98
    decoder.planner.float8 = True
    assert self_check.problem(decoder) is None
    found = cost.of_float8(decoder)
    assert 0.01 < found.output < 0.2
    assert 0.01 < found.gradient < 0.3
    assert all(projection.float8 for projection in decoder.stack[1].projections.values())
    again = run(fast, packed_inputs())
    assert torch.equal(again[0], rounded[0])


def load(folder: Path, *, bits: int | None = 4, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    settings = ModelSettings(model=str(folder), engine="fast", matmul="fp8")
    return load_model(settings, quantization_bit=bits, dtype=dtype, device=CPU, **options)


def test_what_it_costs_is_said(random_model_dir):
    loaded = load(random_model_dir, for_training=True)
    assert loaded.matmul == "fp8"
    assert loaded.decoder.planner.float8
    assert all(projection.float8 for layer in loaded.decoder.stack for projection in layer.projections.values())
    assert "not exact: a layer's output is off by" in loaded.engine_reason
    dropped = load(random_model_dir, for_training=True, tuning=replace(TuningSettings(), lora_dropout=0.2))
    assert "not exact" in dropped.engine_reason
    answering = load(random_model_dir)
    assert "not exact" in answering.engine_reason


def test_an_adapter_that_answers_and_does_not_train(random_model_dir, tmp_path, monkeypatch):
    trained = load(random_model_dir, for_training=True)
    adapter = trained.save_adapter(tmp_path / "adapter", {})
    monkeypatch.setattr("unsloth_factory.model.load._on_a_gpu", lambda loaded: True)
    settings = ModelSettings(model=str(random_model_dir), adapter=str(adapter), engine="fast", matmul="fp8")
    loaded = load_model(settings, quantization_bit=4, dtype=torch.float32, device=CPU)
    assert loaded.has_adapter
    assert "a layer's output is off by" in loaded.engine_reason


def test_a_machine_that_cannot_is_told_apart(random_model_dir, monkeypatch):
    """Looked at before it is trusted, also when nothing is trained; a GPU's own error is no traceback."""
    monkeypatch.setattr("unsloth_factory.model.load._on_a_gpu", lambda loaded: True)
    assert "not exact" in load(random_model_dir).engine_reason
    monkeypatch.setattr("unsloth_factory.kernels.float8.twin", lambda x: 1 / 0)
    with pytest.raises(UserError, match=r"ZeroDivisionError: division by zero\. Leave out --matmul fp8\."):
        load(random_model_dir)


def test_where_it_cannot_be(random_model_dir, monkeypatch):
    with pytest.raises(UsageError, match="--matmul fp8: needs --engine fast"):
        ModelSettings(model="m", matmul="fp8")
    with pytest.raises(UsageError, match="add --quantization_bit 4"):
        load(random_model_dir, bits=None)
    from unsloth_factory.model.load import _check_float8

    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(UsageError, match=r"compute capability 8\.9 .*; Tesla T4 has 7\.5"):
        _check_float8(True, gpu, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UsageError, match="needs --dtype bfloat16, not float16"):
        _check_float8(True, gpu, torch.float16)
    _check_float8(True, gpu, torch.bfloat16)


def test_a_run_goes_on_as_it_began(tmp_path):
    with pytest.raises(UserError, match="--matmul: was exact, now fp8"):
        check_same({"engine": "fast"}, {"engine": "fast", "matmul": "fp8"}, tmp_path)
    check_same({"engine": "fast"}, {"engine": "fast", "matmul": "exact"}, tmp_path)
