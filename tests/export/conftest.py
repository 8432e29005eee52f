"""A tiny run to export: random base, LoRA adapter with real values, its merged model, its GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.export.merge import MergeOptions, merge
from unsloth_factory.export.result import ExportResult
from unsloth_factory.model.fingerprint import AdapterInfo, fingerprint, write_adapter_info


@pytest.fixture(scope="session")
def make_model(request) -> Callable[..., Path]:
    """`make_random_model` of tests/conftest.py."""
    return request.config.pluginmanager.get_plugin(
        str(Path(__file__).resolve().parent.parent / "conftest.py")
    ).make_random_model


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory) -> Callable[..., Path]:
    """Write a LoRA adapter for a base with peft itself; B is random, so that it changes something."""

    def make(base: Path, *, quantization: dict[str, Any] | None = None, record: bool = True, **options: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
        adapted = get_peft_model(model, LoraConfig(**settings))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding" in name or "modules_to_save" in name:
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        folder = tmp_path_factory.mktemp("adapter")
        adapted.save_pretrained(folder)
        if record:
            info = AdapterInfo(base_model=str(base), base_fingerprint=fingerprint(base), quantization=quantization)
            write_adapter_info(folder, info)
        return folder

    return make


@pytest.fixture(scope="session")
def base_dir(make_model, tmp_path_factory) -> Path:
    """A random Qwen3 whose rows are multiples of 256, so that k-quants are real ones."""
    return make_model(tmp_path_factory.mktemp("base"), hidden=256)


@pytest.fixture(scope="session")
def adapter_dir(base_dir: Path, make_adapter) -> Path:
    return make_adapter(base_dir)


@pytest.fixture(scope="session")
def merged_dir(base_dir: Path, adapter_dir: Path, tmp_path_factory) -> Path:
    return merge(base_dir, adapter_dir, tmp_path_factory.mktemp("out") / "merged", MergeOptions()).path


@pytest.fixture(scope="session")
def gguf_result(merged_dir: Path, tmp_path_factory) -> ExportResult:
    """The merged model as a checked f16 file, in a folder with a blank and Chinese characters."""
    output = tmp_path_factory.mktemp("gguf") / "模型 folder" / "demo-f16.gguf"
    return convert(merged_dir, output, GgufOptions(thinking="off", system="你是一位谨慎的医生。"))
