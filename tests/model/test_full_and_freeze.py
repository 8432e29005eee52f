from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.store import save_full
from unsloth_factory.model.weight_files import shard_paths

IDS = [5, 9, 40, 77, 3, 21, 8]
FULL = TuningSettings(finetuning_type="full")


def freeze(last_n):
    return TuningSettings(finetuning_type="freeze", freeze_last_n=last_n)


def trained_names(loaded):
    return {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_freeze_trains_exactly_the_last_layers(family, family_dir, load, row):
    loaded = load(family_dir(family), for_training=True, tuning=freeze(1))
    expected = {name for name, _ in loaded.model.named_parameters() if name.startswith("model.layers.1.")}
    assert trained_names(loaded) == expected
    assert not loaded.has_adapter
    loaded.hidden_states(*row(IDS), None).square().sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.trainable_parameters())


def test_freeze_more_layers_than_there_are(load):
    with pytest.raises(UserError, match=r"--freeze_last_n 5: the model has 2 layers"):
        load(for_training=True, tuning=freeze(5))


def test_full_trains_everything(load):
    loaded = load(for_training=True, tuning=FULL)
    trainable, total = loaded.parameter_counts()
    assert trainable == total


@pytest.mark.parametrize("tuning", [FULL, freeze(1)])
def test_trained_parameters_are_float32_whatever_the_device_computes_in(tuning, load, row):
    loaded = load(dtype=torch.bfloat16, for_training=True, tuning=tuning)
    assert {parameter.dtype for parameter in loaded.trainable_parameters()} == {torch.float32}
    frozen = {p.dtype for p in loaded.model.parameters() if not p.requires_grad}
    assert frozen <= {torch.bfloat16}
    with loaded.autocast():
        logits = loaded.lm_head(loaded.hidden_states(*row(IDS), None))
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    assert {p.grad.dtype for p in loaded.trainable_parameters()} == {torch.float32}


def test_full_starts_from_the_stored_values(load, random_model_dir):
    loaded = load(dtype=torch.bfloat16, for_training=True, tuning=FULL)
    stored = load_file(random_model_dir / "model.safetensors")
    assert all(torch.equal(parameter, stored[name]) for name, parameter in loaded.model.named_parameters())


def test_adapter_with_full_training_is_refused(load, tmp_path):
    adapter = load(for_training=True).save_adapter(tmp_path / "a")
    with pytest.raises(UserError, match="merge the adapter first"):
        load(adapter=adapter, for_training=True, tuning=FULL)


@pytest.mark.parametrize("shard_bytes", [2**30, 40_000])
def test_saved_model_answers_as_the_trained_one(shard_bytes, load, row, tmp_path, random_model_dir):
    loaded = load(for_training=True, tuning=freeze(1))
    with torch.no_grad():
        loaded.trainable_parameters()[0].mul_(1.5)
    folder = save_full(loaded.model, loaded.path, tmp_path / "final_model", max_shard_bytes=shard_bytes)
    assert (len(shard_paths(folder)) > 1) is (shard_bytes < 2**30)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (random_model_dir / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    again = load(folder)
    with torch.no_grad():
        one, other = (m.hidden_states(*row(IDS), None) for m in (loaded, again))
    torch.testing.assert_close(one, other, atol=5e-3, rtol=5e-3)
    assert not list(tmp_path.glob(".*"))


def test_weights_too_large_for_float16_are_stored_as_bfloat16(load, tmp_path):
    loaded = load(for_training=True, tuning=FULL)
    with torch.no_grad():
        loaded.trainable_parameters()[0][0, 0] = 1e5
    loaded.save_full(tmp_path / "m")
    assert load_file(tmp_path / "m" / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_model_that_is_not_finite_is_never_saved(load, tmp_path):
    loaded = load(for_training=True, tuning=FULL)
    with torch.no_grad():
        loaded.trainable_parameters()[0][0, 0] = float("nan")
    with pytest.raises(UserError, match="not saved"):
        loaded.save_full(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_model_with_an_adapter_is_not_saved_whole(load, tmp_path):
    with pytest.raises(UserError, match="written by merge"):
        load(for_training=True).save_full(tmp_path / "m")
