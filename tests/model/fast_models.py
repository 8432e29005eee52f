"""The same small model in both engines, a packed row for them, and how far apart what they compute is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.fast.load import FolderWeights, load_fast
from unsloth_factory.model.lora import attach_lora
from unsloth_factory.model.standard import load_base

CPU = torch.device("cpu")
TUNING = TuningSettings(lora_r=4, lora_alpha=8)


def both(folder: Path, *, bits: int | None = None, tuning: TuningSettings = TUNING) -> tuple[Any, Any]:
    from transformers import AutoConfig

    standard = load_base(folder, quantization_bit=bits, device=CPU, dtype=torch.float32)
    weights = FolderWeights(folder, CPU, torch.float32)
    fast = load_fast(weights, AutoConfig.from_pretrained(folder), quantized=bits is not None)
    models = [attach_lora(model, tuning, 7) for model in (standard, fast)]
    fast.model.bind()
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model.train()
    return models[0], models[1]


def packed_inputs(vocabulary: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    return {"input_ids": torch.randint(5, vocabulary, (1, 20), generator=generator), "position_ids": positions}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))
    (hidden * weights * mask[..., None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach() * mask[..., None], gradients


def same(first: tuple[Any, Any], second: tuple[Any, Any], tolerance: float = 2e-5) -> None:
    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm().clamp(min=1e-6))

    assert error(first[0], second[0]) < tolerance
    assert set(first[1]) == set(second[1])
    worst = max((error(first[1][name], second[1][name]), name) for name in first[1])
    assert worst[0] < tolerance, worst
