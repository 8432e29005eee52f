"""Merging equals peft's own merge; nothing half-written, nothing non-finite, nothing for another base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.export import merge as merge_module
from unsloth_factory.export.merge import MergeOptions, merge, publish_trained
from unsloth_factory.export.weights import OutputTensor, WeightFolder, parse_size, plan_shards
from unsloth_factory.model.dequantize import nf4_round_trip, quantized_weight_names
from unsloth_factory.run.atomic import verify_sums

NF4 = {"bits": 4, "type": "nf4", "double": True, "blocksize": 64, "dtype": "bfloat16"}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with WeightFolder(folder) as weights:
        return {name: weights.tensor(name) for name in weights.names()}


def peft_merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapter))
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "use_rslora": True,
            "alpha_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2},
            "rank_pattern": {"down_proj": 4},
        },
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
)
def test_merge_equals_peft(base_dir, make_adapter, tmp_path, options):
    adapter = make_adapter(base_dir, **options)
    result = merge(base_dir, adapter, tmp_path / "m", MergeOptions())
    expected = peft_merged(base_dir, adapter)
    found = stored(tmp_path / "m")
    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor, expected[name].half()), name
    assert result.figures["kl_max"] < 1e-4
    assert verify_sums(tmp_path / "m") == []


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_families_in_shards(make_model, make_adapter, tmp_path, family):
    base = make_model(tmp_path / "base", family=family)
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "m", MergeOptions(max_shard_size="100KB", dtype="bfloat16"))
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2
    expected = peft_merged(base, adapter)
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in stored(tmp_path / "m").items())
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")  # the folder loads as any other
    assert model.config.rope_parameters["rope_theta"] == 1000000.0
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template


def test_folder_is_readable_for_transformers_4(merged_dir):
    config = json.loads((merged_dir / "config.json").read_text())
    assert config["rope_theta"] == 1000000.0
    assert config["torch_dtype"] == "float16"
    assert "quantization_config" not in config
    tokenizer = json.loads((merged_dir / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in merged_dir.iterdir())


def test_qlora_merges_into_the_values_it_was_trained_on(base_dir, make_adapter, tmp_path):
    adapter = make_adapter(base_dir, quantization=NF4)
    result = merge(base_dir, adapter, tmp_path / "m", MergeOptions())
    assert result.figures["base_weights"] == "as_trained"
    base, found, rounded = stored(base_dir), stored(tmp_path / "m"), quantized_weight_names(base_dir)
    matrices = load_file(adapter / "adapter_model.safetensors")
    for name, tensor in found.items():
        if name not in rounded:
            assert torch.equal(tensor, base[name].half()), name
            continue
        key = "base_model.model." + name.removesuffix(".weight")
        delta = (matrices[f"{key}.lora_B.weight"] @ matrices[f"{key}.lora_A.weight"]) * 2.0
        expected = nf4_round_trip(base[name], torch.bfloat16).float() + delta
        assert torch.equal(tensor, expected.half()), name
    original = merge(base_dir, adapter, tmp_path / "o", MergeOptions(base_weights="original"))
    assert original.figures["base_weights"] == "original"
    q = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(stored(tmp_path / "o")[q], found[q])


def test_compare_base_weights_keeps_the_better(base_dir, make_adapter, tmp_path, capsys):
    adapter = make_adapter(base_dir, quantization=NF4)
    messages = [{"role": "user", "content": "高血压?"}, {"role": "assistant", "content": "低盐饮食。"}]
    split = tmp_path / "validation_split.jsonl"
    split.write_text(json.dumps({"messages": messages, "source": "a:1"}) + "\n", encoding="utf-8")
    options = MergeOptions(compare_base_weights=True, validation_split=split)
    figures = merge(base_dir, adapter, tmp_path / "m", options).figures
    losses = figures["validation_losses"]
    assert set(losses) == {"as_trained", "original"}
    assert figures["base_weights"] == min(losses, key=losses.get)
    assert losses["as_trained"] != losses["original"]
    out = capsys.readouterr().out
    assert f"{losses['original']:.5f}" in out
    assert f"{losses['as_trained']:.5f}" in out
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_overflow_stores_bfloat16_and_names_the_tensor(base_dir, adapter_dir, make_adapter, tmp_path, monkeypatch):
    broken = tmp_path / "base"
    shutil.copytree(base_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(broken)
    monkeypatch.setitem(merge_module.KL_LIMITS, torch.bfloat16, 10.0)  # a norm of 1e5 makes the logits huge
    figures = merge(broken, adapter, tmp_path / "m", MergeOptions()).figures
    assert figures["dtype"] == "bfloat16"
    assert "model.norm.weight" in figures["notes"][0]
    with pytest.raises(UserError, match=r"--dtype float16: model.norm.weight holds 1e\+05"):
        merge(broken, adapter, tmp_path / "n", MergeOptions(dtype="float16"))
    assert not (tmp_path / "n").exists()


def poke(folder: Path, target: Path, name: str, value: float) -> Path:
    shutil.copytree(folder, target)
    path = next(target.glob("*model.safetensors"))
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith(name))
    tensors[name].view(-1)[5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return target


def test_nan_in_adapter_is_refused(base_dir, adapter_dir, tmp_path):
    adapter = poke(adapter_dir, tmp_path / "a", "lora_B.weight", float("nan"))
    with pytest.raises(UserError, match="lora_B.weight holds NaN"):
        merge(base_dir, adapter, tmp_path / "m", MergeOptions())
    assert not (tmp_path / "m").exists()


def test_nan_in_base_is_refused(base_dir, make_adapter, tmp_path):
    base = poke(base_dir, tmp_path / "b", "layers.1.mlp.up_proj.weight", float("inf"))
    adapter = make_adapter(base)
    with pytest.raises(UserError, match=r"layers.1.mlp.up_proj.weight holds NaN or inf"):
        merge(base, adapter, tmp_path / "m", MergeOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b"]


def test_adapter_of_another_base_is_refused(base_dir, adapter_dir, tmp_path):
    other = poke(base_dir, tmp_path / "b", "norm.weight", 1.5)
    with pytest.raises(UserError, match="was trained on"):
        merge(other, adapter_dir, tmp_path / "m", MergeOptions())


@pytest.mark.parametrize(
    ("key", "value"), [("use_dora", True), ("bias", "all"), ("layer_replication", [[0, 1]]), ("new_feature", {"a": 1})]
)
def test_unknown_adapter_features_are_refused_by_name(base_dir, adapter_dir, tmp_path, key, value):
    shutil.copytree(adapter_dir, tmp_path / "a")
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=key):
        merge(base_dir, tmp_path / "a", tmp_path / "m", MergeOptions())


def test_existing_output_needs_overwrite(base_dir, adapter_dir, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="--overwrite"):
        merge(base_dir, adapter_dir, tmp_path / "m", MergeOptions())
    assert (tmp_path / "m" / "mine.txt").read_text() == "x"
    merge(base_dir, adapter_dir, tmp_path / "m", MergeOptions(overwrite=True))
    assert not (tmp_path / "m" / "mine.txt").exists()


@pytest.mark.parametrize("at", [1, 5, 20])
def test_full_disk_leaves_nothing(base_dir, adapter_dir, tmp_path, monkeypatch, at):
    real, calls = merge_module.merged_tensor, []

    def failing(*args):
        calls.append(1)
        if len(calls) == at:
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(merge_module, "merged_tensor", failing)
    with pytest.raises(UserError, match="No space left on device"):
        merge(base_dir, adapter_dir, tmp_path / "m", MergeOptions())
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_refused_before_anything_is_written(base_dir, adapter_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="the merged model needs"):
        merge(base_dir, adapter_dir, tmp_path / "m", MergeOptions())
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_merge_is_not_published(base_dir, adapter_dir, tmp_path, monkeypatch):
    real = merge_module.merged_tensor

    def wrong(tensors, adapter, name, dtype):
        value = real(tensors, adapter, name, dtype)
        return value * 1.05 if name.endswith("0.self_attn.v_proj.weight") else value

    monkeypatch.setattr(merge_module, "merged_tensor", wrong)
    with pytest.raises(UserError, match="does not answer like the adapter"):
        merge(base_dir, adapter_dir, tmp_path / "m", MergeOptions())
    assert list(tmp_path.iterdir()) == []


def test_full_training_is_linked(merged_dir, tmp_path):
    result = publish_trained(merged_dir, tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").samefile(merged_dir / "model.safetensors")
    assert result.figures["dtype"] == "float16"
    assert verify_sums(tmp_path / "m") == []


def test_shard_plan_and_sizes():
    tensors = [OutputTensor("a", (10,)), OutputTensor("b", (5, 2)), OutputTensor("c", (100,)), OutputTensor("d", (1,))]
    assert [[t.name for t in shard] for shard in plan_shards(tensors, 40, 2)] == [["a", "b"], ["c"], ["d"]]
    assert parse_size("4GB") == 4 * 10**9
    assert parse_size("1.5 MiB") == 3 * 2**19
    for text in ("4", "GB", "-1GB", "0MB"):
        with pytest.raises(UserError, match="not a size"):
            parse_size(text)
