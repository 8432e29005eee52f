"""Sizes from config.json alone, against transformers' own modules on the meta device; GPUs by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.model.gpus import GPUS, _recognised, find_gpu
from unsloth_factory.model.paths import TINY_FOLDER
from unsloth_factory.model.shapes import find_config, has_tokenizer, read_shape

BASE = {
    "vocab_size": 320, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2,
}  # fmt: skip
CASES = {
    "llama": ("llama", {}),
    "llama, biases everywhere": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, own head size": ("llama", {"tie_word_embeddings": True, "head_dim": 24}),
    "llama, no grouping": ("llama", {"num_key_value_heads": None}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, key heads not said": ("mistral", {"num_key_value_heads": ..., "num_attention_heads": 16, "head_dim": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, head size not said": ("qwen3", {}),
    "qwen3, tied, biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 16}),
}


def write_config(folder: Path, family: str, changes: dict) -> Path:
    values = {key: value for key, value in (BASE | changes).items() if value is not ...}
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": family, **values}))
    return path


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_those_of_the_real_model(tmp_path: Path, name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    path = write_config(tmp_path, *CASES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(tmp_path)))
    model.tie_weights()
    shape = read_shape(path)
    named = {key: value.numel() for key, value in model.named_parameters()}
    assert shape.total == sum(named.values())
    parts = shape.parameters()
    assert parts["embedding"] == named["model.embed_tokens.weight"]
    assert parts["output head"] == named.get("lm_head.weight", 0)
    matrices = sum(count for key, count in named.items() if "layers." in key and key.endswith("proj.weight"))
    assert parts["layer matrices"] == matrices
    rest = sum(count for key, count in named.items() if "layers." in key and not key.endswith("proj.weight"))
    assert parts["layer biases and norms"] == rest
    linears = {key: module for key, module in model.model.layers[0].named_modules() if hasattr(module, "in_features")}
    assert {key.split(".")[-1]: (m.in_features, m.out_features, m.bias is not None) for key, m in linears.items()} == {
        linear.name: (linear.in_features, linear.out_features, linear.bias) for linear in shape.linears()
    }


def test_the_bundled_model() -> None:
    from safetensors import safe_open

    with safe_open(TINY_FOLDER / "model.safetensors", framework="pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert read_shape(find_config("tiny")).total == stored


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is mamba"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"intermediate_size": True}, "intermediate_size is True"),
    ],
)
def test_a_config_that_cannot_be_sized(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_config(tmp_path, "llama", {})
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        read_shape(path)


def test_sliding_windows_and_stored_quantisation(tmp_path: Path) -> None:
    assert read_shape(write_config(tmp_path, "mistral", {})).sliding_window == 4096
    assert read_shape(write_config(tmp_path, "mistral", {"sliding_window": None})).sliding_window is None
    assert read_shape(write_config(tmp_path, "qwen2", {"sliding_window": 512})).sliding_window is None
    used = {"sliding_window": 512, "use_sliding_window": True}
    assert read_shape(write_config(tmp_path, "qwen2", used)).sliding_window == 512
    assert not read_shape(write_config(tmp_path, "llama", {})).prequantized
    assert read_shape(write_config(tmp_path, "llama", {"quantization_config": {"load_in_4bit": True}})).prequantized


def test_lora_targets(tmp_path: Path) -> None:
    shape = read_shape(write_config(tmp_path, "llama", {}))
    assert len(shape.targets("all")) == 7
    assert [linear.name for linear in shape.targets("v_proj, q_proj")] == ["q_proj", "v_proj"]
    for wrong in ("q_proj,qkv", " , "):
        with pytest.raises(UserError, match="no linear layer"):
            shape.targets(wrong)


def test_where_the_config_is_found(tmp_path: Path) -> None:
    path = write_config(tmp_path, "llama", {})
    assert find_config(str(tmp_path)) == path
    assert find_config(str(path)) == path
    assert has_tokenizer(TINY_FOLDER)
    assert not has_tokenizer(tmp_path)
    (tmp_path / "empty").mkdir()
    for wrong, message in (
        (str(tmp_path / "empty"), "no config.json"),
        (str(tmp_path / "none"), "no such file or folder"),
        (None, "--model is missing"),
    ):
        with pytest.raises(UserError, match=message):
            find_config(wrong)


def test_a_hub_id_fetches_the_small_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    wanted: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        shutil.copy(TINY_FOLDER / "config.json", tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert read_shape(find_config("org/model")).layers == 4
    assert not any("safetensors" in pattern or "bin" in pattern for pattern in wanted[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="cannot be fetched"):
        find_config("org/model")


def test_gpus_by_name() -> None:
    assert find_gpu("t4") is GPUS["T4"]
    assert find_gpu("RTX 4090") is GPUS["4090"]
    assert find_gpu("a100-80gb").memory > find_gpu("A100").memory
    rough = find_gpu("16GB")
    assert rough.products is None
    assert 14 * 2**30 < rough.memory < 16 * 2**30
    assert find_gpu("7.5 GiB").memory < rough.memory
    for wrong in ("T5", "", "0GB", "-4GB", "GB"):
        with pytest.raises(UsageError, match="Known: T4"):
            find_gpu(wrong)


def test_gpus_by_what_the_driver_calls_them() -> None:
    gib = 2**30
    assert _recognised("Tesla T4", int(14.7 * gib), (7, 5)).products == GPUS["T4"].products
    assert _recognised("NVIDIA H200", GPUS["H200"].memory, (9, 0)).measured
    assert _recognised("NVIDIA A100-SXM4-80GB", int(79.2 * gib), (8, 0)).bandwidth == GPUS["A100-80GB"].bandwidth
    assert _recognised("NVIDIA GeForce RTX 3060", int(11.8 * gib), (8, 6)).products == GPUS["3060"].products
    # a smaller card of the same name, a card that merely contains it
    assert _recognised("NVIDIA GeForce RTX 3060", 8 * gib, (8, 6)).products is None
    assert _recognised("NVIDIA L40S", 45 * gib, (8, 9)).products is None
