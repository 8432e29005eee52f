from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.model import fingerprint as module
from unsloth_factory.model.fingerprint import (
    AdapterInfo,
    check_adapter_base,
    check_adapter_folder,
    fingerprint,
    read_adapter_info,
    write_adapter_info,
)
from unsloth_factory.model.weight_files import read_header


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(bytes(data))


def test_it_is_the_same_for_a_copy(random_model_dir, copy_model):
    assert fingerprint(copy_model("another name")) == fingerprint(random_model_dir)


def test_every_byte_of_a_small_file_counts(random_model_dir, copy_model):
    folder = copy_model()
    flip(folder / "model.safetensors", -12_345)
    assert fingerprint(folder) != fingerprint(random_model_dir)


@pytest.mark.parametrize("where", ["start", "middle", "end"])
def test_sampled_bytes_of_a_large_file_count(copy_model, monkeypatch, where):
    monkeypatch.setattr(module, "WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(module, "WINDOW_BYTES", 16)
    folder = copy_model()
    before = fingerprint(folder)
    entry = next(e for e in read_header(folder / "model.safetensors") if e.name == "model.layers.1.mlp.up_proj.weight")
    offset = {"start": entry.start, "middle": (entry.start + entry.stop) // 2, "end": entry.stop - 1}[where]
    flip(folder / "model.safetensors", offset)
    assert fingerprint(folder) != before


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-5}, {"num_attention_heads": 8}, {"something_new": 1}])
def test_config_fields_count(random_model_dir, copy_model, edit_json, changes):
    folder = copy_model()
    edit_json(folder / "config.json", **changes)
    assert fingerprint(folder) != fingerprint(random_model_dir)


@pytest.mark.parametrize("changes", [{"transformers_version": "9"}, {"_name_or_path": "/x"}, {"use_cache": False}])
def test_fields_that_change_no_number_do_not_count(random_model_dir, copy_model, edit_json, changes):
    folder = copy_model()
    edit_json(folder / "config.json", **changes)
    assert fingerprint(folder) == fingerprint(random_model_dir)


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory, random_model_dir):
    from unsloth_factory.config.settings import ModelSettings
    from unsloth_factory.model.load import load_model

    loaded = load_model(ModelSettings(model=str(random_model_dir)), for_training=True)
    return loaded.save_adapter(tmp_path_factory.mktemp("adapters") / "ours", {"thinking": "off"})


@pytest.fixture
def adapter_copy(adapter_dir, tmp_path):
    return shutil.copytree(adapter_dir, tmp_path / "adapter", ignore=shutil.ignore_patterns("SHA256SUMS"))


def test_adapter_remembers_its_training(adapter_dir, random_model_dir):
    info = read_adapter_info(adapter_dir)
    assert info == AdapterInfo(
        base_model=str(random_model_dir), base_fingerprint=fingerprint(random_model_dir), extra={"thinking": "off"}
    )


def test_adapter_on_its_own_base(adapter_dir, random_model_dir):
    assert check_adapter_base(adapter_dir, random_model_dir, fingerprint(random_model_dir), "base") == []


def test_adapter_on_another_base_names_both(adapter_copy, random_model_dir):
    write_adapter_info(adapter_copy, AdapterInfo(base_model="Qwen/Qwen3-8B", base_fingerprint="0" * 64))
    with pytest.raises(UserError, match=r"trained on Qwen/Qwen3-8B .*--model is my-base"):
        check_adapter_base(adapter_copy, random_model_dir, fingerprint(random_model_dir), "my-base")


def test_foreign_adapter_is_checked_by_its_shapes(adapter_copy, random_model_dir):
    (adapter_copy / "unsloth_factory.json").unlink()
    notes = check_adapter_base(adapter_copy, random_model_dir, "any", "my-base")
    assert len(notes) == 1
    assert "its shapes fit my-base" in notes[0]


@pytest.mark.parametrize("damage", ["shape", "module"])
def test_foreign_adapter_that_does_not_fit(adapter_copy, random_model_dir, damage):
    (adapter_copy / "unsloth_factory.json").unlink()
    path = adapter_copy / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("lora_A.weight"))
    if damage == "shape":
        tensors[name] = torch.zeros(16, 96)
    else:
        tensors[name.replace("layers.0", "layers.7")] = tensors.pop(name)
    save_file(tensors, path)
    with pytest.raises(UserError, match="for another base"):
        check_adapter_base(adapter_copy, random_model_dir, "any", "my-base")


@pytest.mark.parametrize(
    ("remove", "message"),
    [("adapter_config.json", "not a PEFT adapter"), ("adapter_model.safetensors", "never read")],
)
def test_incomplete_adapter(adapter_copy, remove, message):
    (adapter_copy / remove).unlink()
    with pytest.raises(UserError, match=message):
        check_adapter_folder(adapter_copy)


def test_run_folder_given_as_adapter(adapter_copy):
    run = adapter_copy.parent / "run"
    shutil.copytree(adapter_copy, run / "final_adapter")
    with pytest.raises(UserError, match=r"Did you mean .*run/final_adapter"):
        check_adapter_folder(run)


def test_missing_adapter_folder(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        check_adapter_folder(tmp_path / "none")


def test_other_adapter_kinds_are_refused(adapter_copy, edit_json):
    edit_json(adapter_copy / "adapter_config.json", peft_type="IA3")
    with pytest.raises(UserError, match="peft_type is IA3"):
        check_adapter_folder(adapter_copy)


def test_damaged_info(adapter_copy):
    (adapter_copy / "unsloth_factory.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(UserError, match=r"unsloth_factory\.json cannot be read"):
        read_adapter_info(adapter_copy)
