from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.dequantize import BaseWeights, nf4_round_trip, quantized_weight_names

IDS = [5, 9, 40, 77, 3, 21, 8]


def held_weights(loaded) -> dict[str, torch.Tensor]:
    """The values that the loaded model's 4-bit layers compute with."""
    from bitsandbytes.functional import dequantize_4bit

    return {
        f"{name}.weight".removeprefix("base_model.model.").replace(".base_layer", ""): dequantize_4bit(
            module.weight.data, module.weight.quant_state
        )
        for name, module in loaded.model.named_modules()
        if module.__class__.__name__ == "Linear4bit"
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_round_trip_is_what_the_model_was_trained_on(family, dtype, family_dir, load):
    loaded = load(family_dir(family), quantization_bit=4, dtype=dtype)
    held = held_weights(loaded)
    base = BaseWeights(family_dir(family), loaded.quantization)
    rounded = {name: tensor for name, tensor in base if base.is_rounded(name)}
    assert set(rounded) == set(held) == quantized_weight_names(family_dir(family))
    for name, tensor in rounded.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, held[name]), name


def test_tied_head_is_not_quantised(copy_model, edit_json, load):
    folder = copy_model()
    edit_json(folder / "config.json", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load(folder, quantization_bit=4)
    assert set(held_weights(loaded)) == quantized_weight_names(folder)
    assert loaded.lm_head.weight is loaded.causal_lm.get_input_embeddings().weight


def test_other_weights_stay_as_stored(random_model_dir, load):
    base = BaseWeights(random_model_dir, load(quantization_bit=4).quantization)
    stored = load_file(random_model_dir / "model.safetensors")
    assert base.names() == list(stored)
    for name in base.names():
        same = torch.equal(base.tensor(name), stored[name])
        assert same is not base.is_rounded(name)
    assert torch.equal(BaseWeights(random_model_dir).tensor("model.layers.0.mlp.up_proj.weight"),
                       stored["model.layers.0.mlp.up_proj.weight"])  # fmt: skip


def test_rounding_error_is_that_of_nf4():
    torch.manual_seed(0)
    weight = torch.randn(256, 256)
    error = (nf4_round_trip(weight, torch.float32) - weight).norm() / weight.norm()
    assert 0.05 < error < 0.12  # about 9 % for Gaussian weights


@pytest.mark.parametrize("checkpointing", [False, True])
def test_qlora_trains_on_a_cpu(checkpointing, load, row):
    loaded = load(quantization_bit=4, for_training=True)
    loaded.set_gradient_checkpointing(checkpointing)
    loaded.model.train()
    optimizer = torch.optim.AdamW(loaded.trainable_parameters(), lr=1e-2)
    ids, positions = row(IDS)
    losses = []
    for _ in range(4):
        logits = loaded.lm_head(loaded.hidden_states(ids, positions, None))
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


def test_answering_between_two_steps_changes_no_weight(load, row):
    """bitsandbytes may repack 4-bit weights at the first pass without gradients (CPUs with AVX512-BF16)."""
    loaded = load(quantization_bit=4, for_training=True)
    before = {name: tensor.clone() for name, tensor in held_weights(loaded).items()}
    with torch.no_grad():
        first = loaded.hidden_states(*row(IDS), None)
    loaded.model.train()
    second = loaded.hidden_states(*row(IDS), None)
    second.sum().backward()
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)
    after = held_weights(loaded)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.fixture(scope="module")
def stored_4bit(random_model_dir, tmp_path_factory):
    """A folder as bnb-4bit repositories have it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from unsloth_factory.model.standard import nf4_config

    folder = tmp_path_factory.mktemp("stored_4bit")
    model = AutoModelForCausalLM.from_pretrained(
        random_model_dir, quantization_config=nf4_config(torch.bfloat16), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_model_dir).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [None, 4])
def test_folder_that_stores_4_bit_weights(bits, stored_4bit, load, row, stir, tmp_path):
    loaded = stir(load(stored_4bit, quantization_bit=bits, for_training=True))
    assert loaded.quantized
    # The folder's maker computed in bfloat16; here the device decides.
    assert {m.compute_dtype for m in loaded.model.modules() if hasattr(m, "compute_dtype")} == {torch.float32}
    loaded.hidden_states(*row(IDS), None).sum().backward()
    loaded.save_adapter(tmp_path / "a")
    again = load(stored_4bit, adapter=tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(again.hidden_states(*row(IDS), None), loaded.hidden_states(*row(IDS), None))
    held = held_weights(loaded)
    base = BaseWeights(stored_4bit, loaded.quantization)
    assert sorted(base.names()) == sorted(BaseWeights(stored_4bit).names())
    for name, tensor in base:
        assert "absmax" not in name
        if base.is_rounded(name):
            assert torch.equal(tensor, held.pop(name))
    # peft's layers hold the base under `.base_layer`; every one of them was met.
    assert held == {}


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_4_bit_weights_cannot_train_themselves(kind, stored_4bit, load):
    with pytest.raises(UserError, match="cannot train themselves"):
        load(stored_4bit, for_training=True, tuning=TuningSettings(finetuning_type=kind))
