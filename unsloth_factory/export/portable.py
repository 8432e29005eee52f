"""The files beside the weights of an exported model, readable by transformers 4 and 5, vLLM and llama.cpp alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.model.store import copy_auxiliary, copy_matching
from unsloth_factory.model.weight_files import read_json

LEGAL_PATTERNS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
DROPPED_KEYS = ("quantization_config", "_name_or_path", "_attn_implementation_autoset", "unsloth_version")


def portable_config(config: dict[str, Any], dtype: torch.dtype, *, untied: bool) -> dict[str, Any]:
    """config.json of the merged model.

    transformers 4.57 ignores `rope_parameters` and then silently takes rope_theta 10000 (Qwen3 uses 1000000), so the
    same values are repeated under their old names.
    """
    out = {key: value for key, value in config.items() if key not in DROPPED_KEYS}
    out["dtype"] = out["torch_dtype"] = str(dtype).removeprefix("torch.")
    rope = out.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        out.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            out.setdefault("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
    if untied:
        out["tie_word_embeddings"] = False
    return out


def portable_tokenizer_config(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json without what only transformers 5 can read; unchanged when there is nothing of that."""
    out = dict(config)
    if isinstance(out.get("extra_special_tokens"), list):
        out["additional_special_tokens"] = out.pop("extra_special_tokens")
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
    if out != config:
        for key in ("backend", "is_local", "local_files_only"):
            out.pop(key, None)
    return out


def write_companions(base: Path, folder: Path, dtype: torch.dtype, *, untied: bool, chat_template: str | None) -> None:
    """Write everything but the weights and the model card into `folder`.

    Args:
        base: Base model folder that tokenizer, generation settings and licence come from, unchanged.
        folder: Folder of the merged model.
        dtype: Type of the stored weights.
        untied: The output head has weights of its own although the base's had not.
        chat_template: Template that the run was trained with, when it is not the base's own.
    """
    copy_auxiliary(base, folder)
    copy_matching(base, folder, LEGAL_PATTERNS)
    config = portable_config(read_json(base / "config.json"), dtype, untied=untied)
    _write_json(folder / "config.json", config)
    tokenizer_path = folder / "tokenizer_config.json"
    if tokenizer_path.is_file():
        before = read_json(tokenizer_path)
        after = portable_tokenizer_config(before)
        if chat_template is not None:
            after.pop("chat_template", None)  # chat_template.jinja is the one place
        if after != before:
            _write_json(tokenizer_path, after)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def model_card(base_name: str, figures: dict[str, Any]) -> str:
    """A short model card: where the weights come from and how faithful they are."""
    lines = [
        "---",
        f"base_model: {json.dumps(base_name, ensure_ascii=False)}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        "# Fine-tuned model",
        "",
        f"A LoRA adapter merged into `{base_name}` by unsloth-factory. The base model's licence applies.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key.replace('_', ' ')} | {value} |" for key, value in figures.items()),
        "",
    ]
    return "\n".join(lines)
