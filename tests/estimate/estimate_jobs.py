"""Model shapes and trainings that the tests of the estimates share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from unsloth_factory.estimate.memory import Training  # noqa: E402
from unsloth_factory.model.shapes import ModelShape  # noqa: E402

MIB, GIB = 2**20, 2**30


def qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape("qwen3", layers, hidden, intermediate, heads, 8, 128, 151_936, tied, head_norms=True)


SHAPES = {
    "0.6B": qwen3(28, 1024, 3072, 16, True),
    "1.7B": qwen3(28, 2048, 6144, 16, True),
    "4B": qwen3(36, 2560, 9728, 32, True),
    "8B": qwen3(36, 4096, 12288, 32, False),
}
# One H200, torch 2.11, 2026-11-22 (benchmarks/plan_accuracy.py): rows, dense mask, trained positions of the longest
# micro-batch; max_memory_allocated and max_memory_reserved; how far the prediction may be from the latter.


def training(shape: ModelShape, kind: str = "qlora", **changes: Any) -> Training:
    kinds = {"qlora": ("lora", True), "lora": ("lora", False), "full": ("full", False), "freeze": ("freeze", False)}
    name, quantized = kinds[kind]
    return Training(shape, name, quantized, **changes)  # type: ignore[arg-type]


# -- memory: what was measured on the GPU -----------------------------------------------------------------------------
