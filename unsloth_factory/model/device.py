"""Which device computes, and in which number format."""

from __future__ import annotations

import os

import torch

from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.settings import TuningSettings

BF16_CAPABILITY = (8, 0)


def pick_device_dtype(asked: str = "auto") -> tuple[torch.device, torch.dtype, str]:
    """(device, computation dtype, reason to print).

    The compute capability decides. `torch.cuda.is_bf16_supported()` says yes on a T4 as well, where bfloat16 is
    emulated and many times slower than float16.

    Args:
        asked: --dtype: auto, float16 or bfloat16.

    Raises:
        UsageError: The device cannot compute in the dtype that was asked for.
    """
    if not torch.cuda.is_available():
        if asked != "auto":
            raise UsageError(f"--dtype {asked}: no CUDA GPU was found, and the CPU computes in float32. Leave it out.")
        return torch.device("cpu"), torch.float32, "no CUDA GPU was found, so the CPU computes in float32"
    # One process drives one GPU; accelerate and torchrun tell it which.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    capability = torch.cuda.get_device_capability(device)
    name = f"{torch.cuda.get_device_name(device)} (compute capability {capability[0]}.{capability[1]})"
    if asked == "float16":
        return device, torch.float16, f"{name}, float16 with loss scaling as asked for"
    if capability >= BF16_CAPABILITY:
        return device, torch.bfloat16, f"{name} has bfloat16 units"
    if asked == "bfloat16":
        raise UsageError(
            f"--dtype bfloat16: {name} has no bfloat16 units (they start at 8.0). Use --dtype float16, or leave it out."
        )
    return device, torch.float16, f"{name} has no bfloat16 units (they start at 8.0), so float16 with loss scaling"


def default_quantization(tuning: TuningSettings, device: torch.device) -> int | None:
    """Bits of the base weights: as asked; else 4 for LoRA on a GPU unless --no_quantization, none on a CPU."""
    if tuning.quantization_bit is not None:
        return tuning.quantization_bit
    wants_4bit = tuning.finetuning_type == "lora" and not tuning.no_quantization
    return 4 if wants_4bit and device.type == "cuda" else None
