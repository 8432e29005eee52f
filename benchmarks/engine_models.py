"""Models for the benchmarks of the engine: the shapes of real ones with random weights, whole or with fewer layers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "unsloth_factory" / "assets" / "tiny_model"

QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": QWEN_ROPE | {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen2-7b": QWEN_ROPE | {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


def make(folder: Path, layers: int | None = None) -> None:
    """A model folder named as one of `SHAPES`, with random weights and the bundled tokenizer.

    Args:
        folder: Is left as it is where it has weights.
        layers: Other than the shape's own.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.plan_accuracy import write_weights

    if (folder / "model.safetensors").is_file():
        return
    values = {"max_position_embeddings": 40960, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False}
    values |= SHAPES[folder.name] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(**values, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for path in TINY.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, folder)
    write_weights(folder / "model.safetensors", {name: list(p.shape) for name, p in model.named_parameters()})


def depth(folder: Path) -> int:
    """Layers of a model."""
    return int(json.loads((folder / "config.json").read_text())["num_hidden_layers"])


def shortened(folder: Path, layers: int, into: Path) -> Path:
    """A model of the first layers of another, in a folder in `into`; the weights are a link, so that it costs nothing.

    Every loader reads the tensors that config.json asks for, and leaves the others in the file alone.
    """
    if layers == depth(folder):
        return folder
    target = into / f"{folder.name}-{layers}-layers"
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name != "config.json" and not (target / path.name).exists():
            os.symlink(path.resolve(), target / path.name)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    (target / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    return target
