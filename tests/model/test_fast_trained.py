"""The fast engine beyond plain LoRA: weights that train themselves, and LoRA dropout, against transformers and peft."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.kernels.dropout import twin
from unsloth_factory.model import tuning
from unsloth_factory.model.fast import trained
from unsloth_factory.model.fast.decoder import STREAMS
from unsloth_factory.model.fast.head import cross_entropy_sum
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.load import FUSED, FolderWeights, load_fast
from unsloth_factory.model.load import load_model
from unsloth_factory.model.standard import load_base

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fast_models import CPU, both, packed_inputs, run, same  # noqa: E402


def both_trained(folder: Path, last_n: int | None) -> tuple[Any, Any]:
    """Full or freeze fine-tuning by both engines, in float32."""
    from transformers import AutoConfig

    standard = load_base(folder, quantization_bit=None, device=CPU, dtype=torch.float32)
    fast = load_fast(FolderWeights(folder, CPU, torch.float32), AutoConfig.from_pretrained(folder), quantized=False)
    if last_n is None:
        tuning.train_all(standard)
        trained.train_all(fast, torch.float32)
    else:
        tuning.train_last_layers(standard, last_n)
        trained.train_last_layers(fast, last_n, torch.float32)
    fast.model.bind()
    for model in (standard, fast):
        model.get_base_model = lambda model=model: model
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.requires_grad:  # 1 everywhere hides what forgets them
                values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5
                parameter.data.copy_(values)
    return standard.train(), fast.train()


@pytest.mark.parametrize("last_n", [None, 1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_gradients_of_the_weights_themselves(family_dir, family, last_n):
    standard, fast = both_trained(family_dir(family), last_n)
    wanted, found = run(standard, packed_inputs()), run(fast, packed_inputs())
    head = found[1].pop("lm_head.weight", None)  # no part of what `run` computes
    assert head is None or not head.any()
    same(found, wanted)
    trains = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in standard.named_parameters() if p.requires_grad}
    assert set(found[1]) == trains - {"lm_head.weight"}


def test_gradient_of_the_head():
    hidden, weight, targets = torch.randn(20, 8), torch.randn(30, 8), torch.arange(20)
    found = []
    for chunk in (None, 4 * 30 * 7):  # torch's own, and seven rows at a time
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if chunk is None:
            loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum")
        else:
            loss = cross_entropy_sum(inputs[0], inputs[1], targets, chunk)
        found.append((loss, *torch.autograd.grad(loss * 0.3, inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saving", list(Saving))
def test_gradients_of_the_weights_are_bit_equal_whatever_is_kept(random_model_dir, saving):
    _, fast = both_trained(random_model_dir, None)
    kept = run(fast, packed_inputs())
    fast.model.planner.forced = saving
    again = run(fast, packed_inputs())
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_trained_weights_add_gradients_up_and_compute_in_16_bit(random_model_dir):
    from transformers import AutoConfig

    weights = FolderWeights(random_model_dir, CPU, torch.float32)
    fast = load_fast(weights, AutoConfig.from_pretrained(random_model_dir), quantized=False)
    trained.train_all(fast, torch.bfloat16)
    inputs = packed_inputs()
    hidden = fast.model(**inputs).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    once = {name: p.grad.clone() for name, p in fast.named_parameters()}
    fast.model(**inputs).last_hidden_state.float().square().sum().backward()
    for name, gradient in once.items():
        assert gradient.dtype == torch.float32
        assert gradient.any() or name == "lm_head.weight", name
        assert torch.allclose(fast.get_parameter(name).grad, 2 * gradient, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_trained_weights_in_bfloat16_are_about_as_exact_as_by_torch(family_dir, family):
    """torch's autocast leaves hidden states between layers in float32, the fast engine has them in 16 bit."""

    def gradients(engine: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        loaded = load_model(
            ModelSettings(model=str(family_dir(family)), engine=engine), dtype=dtype, for_training=True,
            tuning=TuningSettings(finetuning_type="full"), device=CPU,
        )  # fmt: skip
        loaded.model.train()
        inputs = packed_inputs()
        hidden = loaded.hidden_states(inputs["input_ids"], inputs["position_ids"], None)
        with loaded.autocast():
            loaded.lm_head(hidden).float().square().mean().backward()
        return {name: p.grad for name, p in loaded.model.named_parameters()}

    reference = gradients("standard", torch.float32)
    standard, fast = (gradients(engine, torch.bfloat16) for engine in ("standard", "fast"))
    for name, wanted in reference.items():
        assert fast[name].dtype == torch.float32
        ours, theirs = ((found[name] - wanted).norm() / wanted.norm() for found in (fast, standard))
        assert ours <= 1.6 * theirs + 5e-3, name


DROPPED = TuningSettings(lora_r=4, lora_alpha=8, lora_dropout=0.3)


class SameDropout(torch.nn.Module):
    """In peft's place for it: drops what the fast engine drops in one matrix."""

    def __init__(self, seed: torch.Tensor, stream: int) -> None:
        super().__init__()
        self.seed, self.stream = seed, stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = twin(torch.ones(x.shape[1:]), DROPPED.lora_dropout, self.seed, self.stream)
        return x * mask[None]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_lora_dropout(family_dir, family, bits):
    """With the same masks the gradients are peft's; and there are none unless it trains."""
    standard, fast = both(family_dir(family), bits=bits, tuning=DROPPED)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, (1,))
    for index, layer in enumerate(standard.get_base_model().model.layers):
        for number, parts in enumerate(FUSED.values()):
            for place, name in enumerate(parts):
                stream = STREAMS * (4 * index + number) + place
                layer.get_submodule(name).lora_dropout["default"] = SameDropout(seed, stream)
    torch.manual_seed(11)
    ours = run(fast, packed_inputs())
    same(ours, run(standard, packed_inputs()))
    other = run(fast, packed_inputs())
    assert (other[0] - ours[0]).abs().max() > 1e-3  # another micro-batch, other numbers
    torch.manual_seed(11)
    before = torch.get_rng_state()
    plain = run(fast.eval(), packed_inputs())
    assert torch.equal(torch.get_rng_state(), before)
    same(plain, run(both(family_dir(family), bits=bits)[1], packed_inputs()), 1e-6)


def test_dropout_differs_between_layers_and_projections(random_model_dir):
    _, fast = both(random_model_dir, tuning=DROPPED)
    decoder = fast.get_base_model().model
    streams = [
        one.stream + place
        for layer in decoder.stack
        for one in layer.projections.values()
        for place in range(len(one.parts))
    ]
    assert len(streams) == len(set(streams)) == 7 * len(decoder.stack)


@pytest.mark.parametrize("saving", list(Saving))
def test_dropout_is_the_same_when_a_layer_is_computed_again(random_model_dir, saving):
    _, fast = both(random_model_dir, tuning=DROPPED)
    torch.manual_seed(3)
    kept = run(fast, packed_inputs())
    fast.get_base_model().model.planner.forced = saving
    torch.manual_seed(3)
    again = run(fast, packed_inputs())
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])
