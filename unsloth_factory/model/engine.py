"""Which engine runs a model: the one asked for, or with --engine auto the fastest that can be trusted with it here."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.standard import is_prequantized
from unsloth_factory.model.weight_files import read_json

TRANSFORMERS = "transformers, peft and bitsandbytes"
ODD_ADAPTERS = ("use_dora", "lora_bias", "modules_to_save")
"""peft's settings that the fast engine does not know."""


def choose_engine(
    requested: str,
    folder: Path,
    tuning: TuningSettings | None,
    device: torch.device,
    *,
    adapter: Path | None,
    quantized: bool,
    prefers: str,
) -> tuple[str, str]:
    """(engine, reason to print).

    Args:
        requested: --engine.
        folder: The model's.
        tuning: How it is trained; None when it is not.
        device: Where it is to run.
        adapter: That goes on training, or that is used.
        quantized: In 4 bit.
        prefers: What --engine auto begins with.

    Raises:
        UsageError: An engine that this version does not have was asked for by name, or one that cannot run this model.
    """
    if requested == "standard":
        return "standard", "asked for"
    if requested == "fast":
        reason = why_not_fast(folder, tuning, adapter, quantized=quantized)
        if reason is not None:
            raise UsageError(f"--engine fast cannot run {folder.name}: {reason}. Use --engine standard.")
        return "fast", "asked for"
    if requested == "auto":
        if prefers != "fast":
            return "standard", TRANSFORMERS
        reason = _why_not_here(device) or why_not_fast(folder, tuning, adapter, quantized=quantized)
        if reason is not None:
            return "standard", f"{TRANSFORMERS}; the fast engine cannot run {reason}"
        if tuning is not None and tuning.finetuning_type != "lora":
            kind = f"--finetuning_type {tuning.finetuning_type}"
            return "standard", f"{TRANSFORMERS}; the fast engine was not measured with {kind} yet, and runs by name"
        return "fast", "exact, and the quickest for this model; its kernels were checked on this GPU just now"
    state = ""
    if requested == "unsloth":
        installed = importlib.util.find_spec("unsloth") is not None
        state = (
            " (the library is installed, but cannot be driven yet)" if installed else " (nor is the library installed)"
        )
    raise UsageError(f"--engine {requested}: not in this version{state}. Use --engine standard, fast or auto.")


def _why_not_here(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "without a GPU"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return "in several processes"
    return "without Triton (pip install triton)" if importlib.util.find_spec("triton") is None else None


def why_not_fast(folder: Path, tuning: TuningSettings | None, adapter: Path | None, *, quantized: bool) -> str | None:
    """What the fast engine cannot run: of the model, its adapter or the way of training; None where it can."""
    from transformers import AutoConfig

    from unsloth_factory.model.fast.spec import FAMILIES, why_not

    if is_prequantized(folder):
        return "weights that are stored in 4 bit"
    if adapter is not None:
        settings = read_json(adapter / "adapter_config.json")
        odd = [key for key in ODD_ADAPTERS if settings.get(key)]
        if odd:
            return f"an adapter with {odd[0]}"
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in FAMILIES:  # transformers may not know it either; that is for the standard engine to say
        return f"model type {kind} (it knows {', '.join(FAMILIES)})"
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # configurations check themselves, and each kind throws errors of its own
        return f"this config.json ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
    return why_not(config, quantized=quantized)
