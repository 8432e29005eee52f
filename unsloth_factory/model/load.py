"""One call from settings to a model that is ready to train or to answer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.model.device import pick_device_dtype
from unsloth_factory.model.fingerprint import check_adapter_base, fingerprint
from unsloth_factory.model.finite import refuse_nonfinite
from unsloth_factory.model.integrity import refuse_damaged
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.model.lora import attach_lora, load_adapter
from unsloth_factory.model.noise import quiet_libraries
from unsloth_factory.model.paths import resolve_model
from unsloth_factory.model.standard import is_prequantized, load_base, load_tokenizer
from unsloth_factory.model.tuning import train_all, train_last_layers
from unsloth_factory.model.weight_files import read_json, shard_paths


def choose_engine(requested: str) -> tuple[str, str]:
    """(engine, reason to print).

    Raises:
        UsageError: An engine that this version does not have was asked for by name.
    """
    if requested == "standard":
        return "standard", "asked for"
    if requested == "auto":
        return "standard", "transformers, peft and bitsandbytes; --engine fast is quicker and still on trial"
    if requested == "fast":
        return "fast", "asked for"
    state = ""
    if requested == "unsloth":
        installed = importlib.util.find_spec("unsloth") is not None
        state = (
            " (the library is installed, but cannot be driven yet)" if installed else " (nor is the library installed)"
        )
    raise UsageError(f"--engine {requested}: not in this version{state}. Use --engine standard, fast or auto.")


def load_model(
    settings: ModelSettings,
    *,
    quantization_bit: int | None = None,
    dtype: torch.dtype | None = None,
    for_training: bool = False,
    tuning: TuningSettings | None = None,
    seed: int = 3407,
    device: torch.device | None = None,
) -> LoadedModel:
    """Check, load and prepare a model.

    Args:
        settings: Model, adapter, hub and engine.
        quantization_bit: 4 loads the base in NF4; None in `dtype` (`device.default_quantization` holds the policy).
        dtype: Computation dtype; None for the device's own (`device.pick_device_dtype`).
        for_training: Make parameters trainable as `tuning` says, and switch on gradient checkpointing on a GPU (a CPU
            keeps the activations: memory is there, time is not). The model stays in evaluation mode; the loop calls
            `model.train()`.
        tuning: LoRA, full or freeze; default settings when None. With `settings.adapter` that adapter goes on training
            with its own rank and targets.
        seed: Of the initial LoRA weights.
        device: Other than the picked one.

    Returns:
        The model in evaluation mode. Print `engine_reason`, `device_reason` and `notes`.

    Raises:
        UserError: Anything about the files, the settings or the memory that the user can mend.
    """
    engine, engine_reason = choose_engine(settings.engine)
    tuning = tuning or TuningSettings()
    folder = resolve_model(settings.model, settings.hub)
    adapter = Path(settings.adapter).expanduser() if settings.adapter else None
    identity = fingerprint(folder)
    name = settings.model or ""
    notes = check_adapter_base(adapter, folder, identity, name) if adapter else []
    tunes_base = for_training and tuning.finetuning_type != "lora"
    quantized = quantization_bit is not None or is_prequantized(folder)
    if tunes_base:
        _check_base_can_train(tuning, name, quantized, adapter)
    if quantized:
        _require_bitsandbytes()
    picked_device, picked_dtype, device_reason = pick_device_dtype()
    device, dtype = device or picked_device, dtype or picked_dtype
    if settings.max_memory is not None:
        notes += limit_memory(settings.max_memory, device)
    refuse_damaged(folder)
    refuse_nonfinite(shard_paths(folder))
    # Full training wants the stored values in float32, not what a 16-bit dtype leaves of them.
    stored = torch.float32 if tunes_base and tuning.finetuning_type == "full" else dtype
    with quiet_libraries():
        read: Callable[..., Any] = load_base
        if engine == "fast":
            read = partial(_read_fast, tuning=tuning if for_training else None, low_memory=settings.low_memory)
        model = _load_within_memory(read, folder, quantization_bit, device, stored)
        loaded = LoadedModel(
            model=model,
            tokenizer=load_tokenizer(folder),
            path=folder,
            engine=engine,
            engine_reason=engine_reason,
            device=device,
            dtype=dtype,
            quantized=quantized,
            fingerprint=identity,
            name=name,
            device_reason=device_reason,
            quantization=quantization_record(folder, dtype) if quantized else None,
            notes=notes,
        )
        _prepare(loaded, adapter, tuning, for_training, seed)
    return loaded


def quantization_record(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """How the base is quantised, in the form that an adapter records; `stored` when the folder itself is 4-bit."""
    record = {"bits": 4, "type": "nf4", "double": True, "blocksize": 64, "dtype": str(dtype).removeprefix("torch.")}
    if is_prequantized(folder):
        config = read_json(folder / "config.json")["quantization_config"]
        record["type"] = config.get("bnb_4bit_quant_type", "fp4")
        record["double"] = bool(config.get("bnb_4bit_use_double_quant", False))
    return record | {"stored": is_prequantized(folder)}


def limit_memory(most: int, device: torch.device) -> list[str]:
    """Let this process take no more of the GPU than `most` bytes; notes where that means nothing.

    Raises:
        UsageError: It is more than the GPU has.
    """
    if device.type != "cuda":
        return ["--max_memory limits the memory of a GPU; there is none in use."]
    total = torch.cuda.get_device_properties(device).total_memory
    if most > total:
        raise UsageError(f"--max_memory {most / 2**30:.1f}GiB: the GPU has {total / 2**30:.1f} GiB.")
    torch.cuda.set_per_process_memory_fraction(most / total, device)
    return []


def _check_base_can_train(tuning: TuningSettings, name: str, quantized: bool, adapter: Path | None) -> None:
    kind = tuning.finetuning_type
    if quantized:
        raise UserError(
            f"--finetuning_type {kind} with 4-bit weights ({name}): they cannot train themselves. Use "
            "--finetuning_type lora, or an unquantised base."
        )
    if adapter is not None:
        raise UserError(
            f"--adapter {adapter} with --finetuning_type {kind}: merge the adapter first, and give the merged model as "
            "--model."
        )


def _require_bitsandbytes() -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "4-bit weights need bitsandbytes: pip install bitsandbytes. Or train without them: --no_quantization."
        )


def _read_fast(
    folder: Path,
    *,
    quantization_bit: int | None,
    device: torch.device,
    dtype: torch.dtype,
    tuning: TuningSettings | None,
    low_memory: bool,
) -> Any:
    """The fast engine's model.

    Raises:
        UsageError: It cannot run this model, or not train it in this way.
    """
    from transformers import AutoConfig

    from unsloth_factory.model.fast.load import FolderWeights, load_fast
    from unsloth_factory.model.fast.planner import is_small
    from unsloth_factory.model.fast.spec import why_not

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    reason = why_not(config, quantized=quantization_bit is not None)
    if is_prequantized(folder):
        reason = "weights that are stored in 4 bit"
    elif tuning is not None and tuning.finetuning_type != "lora":
        reason = f"--finetuning_type {tuning.finetuning_type}"
    elif tuning is not None and tuning.lora_dropout:
        reason = f"--lora_dropout {tuning.lora_dropout:g}"
    if reason is not None:
        raise UsageError(f"--engine fast cannot run {folder.name}: {reason}. Use --engine standard.")
    weights = FolderWeights(folder, device, dtype)
    # Training can wait for rows of the embedding to come from the CPU, a word after the other cannot.
    host_embedding = low_memory or (tuning is not None and is_small(device))
    return load_fast(
        weights, config, quantized=quantization_bit is not None, host_embedding=host_embedding, recompute=low_memory
    )


def _load_within_memory(
    read: Callable[..., Any], folder: Path, quantization_bit: int | None, device: torch.device, dtype: torch.dtype
) -> Any:
    try:
        return read(folder, quantization_bit=quantization_bit, device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        size = sum(path.stat().st_size for path in shard_paths(folder)) / 2**30
        advice = "Use a smaller model." if quantization_bit else "Use --quantization_bit 4, or a smaller model."
        raise UserError(f"--model {folder} ({size:.1f} GiB on disk) does not fit on {device}. {advice}") from error


def _prepare(loaded: LoadedModel, adapter: Path | None, tuning: TuningSettings, for_training: bool, seed: int) -> None:
    """Attach the adapter or choose the trained parameters, on the model that was just loaded."""
    if adapter is not None:
        loaded.model = load_adapter(loaded.model, adapter, trainable=for_training)
        loaded.has_adapter = True
        rank = loaded.model.peft_config["default"].r
        if for_training and rank != tuning.lora_r:
            loaded.notes.append(f"{adapter} goes on training with its own rank {rank}, not --lora_r {tuning.lora_r}.")
    elif for_training and tuning.finetuning_type == "lora":
        loaded.model = attach_lora(loaded.model, tuning, seed)
        loaded.has_adapter = True
    elif for_training and tuning.finetuning_type == "full":
        train_all(loaded.model)
    elif for_training:
        train_last_layers(loaded.model, tuning.freeze_last_n)
    if loaded.engine == "fast":
        _bind(loaded)
    if for_training and loaded.device.type == "cuda":
        loaded.set_gradient_checkpointing(True)
    loaded.model.eval()


def _bind(loaded: LoadedModel) -> None:
    """Let the fast engine's decoder know the adapter."""
    if loaded.has_adapter:
        config = loaded.model.peft_config["default"]
        odd = [
            key for key in ("use_dora", "lora_bias", "modules_to_save", "lora_dropout") if getattr(config, key, None)
        ]
        if odd:
            raise UsageError(f"--engine fast cannot run this adapter: {odd[0]}. Use --engine standard.")
    loaded.decoder.bind()
