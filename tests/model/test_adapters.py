from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.lora import target_modules

IDS = [5, 9, 40, 77, 3, 21, 8]


def states(loaded, row):
    with torch.no_grad():
        return loaded.hidden_states(*row(IDS), None)


@pytest.mark.parametrize("bits", [None, 4])
def test_new_lora_changes_nothing_until_it_is_trained(bits, load, row, stir):
    base = states(load(quantization_bit=bits), row)
    loaded = load(quantization_bit=bits, for_training=True)
    assert torch.equal(states(loaded, row), base)
    stir(loaded)
    assert not torch.allclose(states(loaded, row), base)
    with loaded.adapter_disabled():
        assert torch.equal(states(loaded, row), base)
    assert len(loaded.trainable_parameters()) == 2 * 7 * 2
    assert not torch.allclose(states(loaded, row), base)


def test_initial_weights_come_from_the_seed_alone(load):
    torch.manual_seed(1)
    first = load(for_training=True, seed=7).trainable_parameters()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = load(for_training=True, seed=7).trainable_parameters()
    assert torch.equal(torch.get_rng_state(), before)
    other = load(for_training=True, seed=8).trainable_parameters()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_parameter_count_of_lora(load):
    loaded = load(for_training=True, tuning=TuningSettings(lora_r=4, lora_target="q_proj, v_proj"))
    # q: 64 -> 64, v: 64 -> 32 (2 KV heads of 16); 2 layers
    assert loaded.parameter_counts()[0] == 2 * 4 * ((64 + 64) + (64 + 32))
    assert {p.dtype for p in loaded.trainable_parameters()} == {torch.float32}


def test_lora_target_names(load):
    model = load().model
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert target_modules(model, "all") == every
    with pytest.raises(UserError, match=r"--lora_target q_prj: .*Did you mean q_proj\?"):
        target_modules(model, "v_proj,q_prj")
    with pytest.raises(UserError, match="lm_head"):
        target_modules(model, "lm_head")
    with pytest.raises(UserError, match="empty"):
        target_modules(model, " , ")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
@pytest.mark.parametrize("bits", [None, 4])
def test_save_and_load_give_the_same_model(family, bits, family_dir, load, row, stir, tmp_path):
    trained = stir(load(family_dir(family), quantization_bit=bits, for_training=True))
    trained.save_adapter(tmp_path / "adapter")
    again = load(family_dir(family), adapter=tmp_path / "adapter", quantization_bit=bits)
    assert torch.equal(states(again, row), states(trained, row))
    assert again.notes == []
    assert again.trainable_parameters() == []


def test_16_bit_base_keeps_the_adapter_in_full_precision(load, stir, tmp_path):
    trained = stir(load(dtype=torch.bfloat16, for_training=True))
    trained.save_adapter(tmp_path / "a")
    again = load(adapter=tmp_path / "a", dtype=torch.bfloat16, for_training=True)
    for one, other in zip(trained.trainable_parameters(), again.trainable_parameters(), strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
    base = {p.dtype for p in again.model.parameters() if not p.requires_grad}
    assert base == {torch.bfloat16}


def test_the_files(load, stir, tmp_path, random_model_dir):
    loaded = stir(load(quantization_bit=4, for_training=True))
    one = loaded.save_adapter(tmp_path / "one", {"thinking": "off"})
    two = loaded.save_adapter(tmp_path / "two", {"thinking": "off"})
    names = ["SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "unsloth_factory.json"]
    assert sorted(os.listdir(one)) == names
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert (one / name).stat().st_mode & 0o777 == 0o644
    config = json.loads((one / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(random_model_dir)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (16, 32, True)
    assert config["target_modules"] == sorted(config["target_modules"])  # a set in peft: its order is chance
    info = json.loads((one / "unsloth_factory.json").read_text())
    assert info["base_fingerprint"] == loaded.fingerprint
    assert info["quantization"]["dtype"] == "float32"


def test_peft_itself_reads_the_adapter(load, row, stir, tmp_path, random_model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    loaded = stir(load(for_training=True))
    loaded.save_adapter(tmp_path / "a")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(random_model_dir), tmp_path / "a").eval()
    with torch.no_grad():
        reference = model(input_ids=row(IDS)[0]).logits
        torch.testing.assert_close(loaded.lm_head(states(loaded, row)), reference, atol=1e-5, rtol=1e-5)


def test_adapter_goes_on_training_with_its_own_rank(load, stir, tmp_path):
    stir(load(for_training=True, tuning=TuningSettings(lora_r=4))).save_adapter(tmp_path / "a")
    loaded = load(adapter=tmp_path / "a", for_training=True, tuning=TuningSettings(lora_r=16))
    assert len(loaded.trainable_parameters()) == 28
    assert loaded.parameter_counts()[0] == 4 * 32768 // 16
    assert "own rank 4" in loaded.notes[0]


def test_switching_a_frozen_adapter_off_and_on_leaves_it_frozen(load, stir, tmp_path):
    stir(load(for_training=True)).save_adapter(tmp_path / "a")
    loaded = load(adapter=tmp_path / "a")
    with loaded.adapter_disabled():
        pass
    assert loaded.trainable_parameters() == []


@pytest.fixture
def saved(load, stir, tmp_path):
    """An adapter that a test may damage: without the checksums that would tell."""
    folder = stir(load(for_training=True)).save_adapter(tmp_path / "saved")
    (folder / "SHA256SUMS").unlink()
    return folder


def test_adapter_that_is_not_finite_is_refused_at_load(saved, load):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{name} holds NaN"):
        load(adapter=saved)


def test_adapter_that_is_not_finite_is_never_saved(load, tmp_path):
    loaded = load(for_training=True)
    with torch.no_grad():
        loaded.trainable_parameters()[5][0, 0] = float("inf")
    with pytest.raises(UserError, match="not saved"):
        loaded.save_adapter(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_adapter_with_a_tensor_missing(saved, load):
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"{name} is missing in the file"):
        load(adapter=saved)


def test_initialisation_that_changes_the_base_is_refused(saved, load, edit_json):
    edit_json(saved / "adapter_config.json", init_lora_weights="pissa")
    with pytest.raises(UserError, match="init_lora_weights is pissa"):
        load(adapter=saved)


def test_rank_that_does_not_fit_the_weights(saved, load, edit_json):
    edit_json(saved / "adapter_config.json", r=8)
    with pytest.raises(UserError, match="does not fit the model"):
        load(adapter=saved)


def test_adapter_for_another_base_is_refused(saved, load, copy_model, edit_json):
    folder = copy_model()
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    with pytest.raises(UserError, match="was trained on"):
        load(folder, adapter=saved)


def test_foreign_adapter_is_loaded_with_a_warning(saved, load, tmp_path):
    foreign = shutil.copytree(saved, tmp_path / "foreign")
    (foreign / "unsloth_factory.json").unlink()
    assert "all that can be checked" in load(adapter=foreign).notes[0]
