"""One call from settings to a model that is ready to train or to answer."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.kernels.float8 import CAPABILITY
from unsloth_factory.model.device import pick_device_dtype
from unsloth_factory.model.engine import TRANSFORMERS, choose_engine
from unsloth_factory.model.fast import cost, self_check
from unsloth_factory.model.fingerprint import check_adapter_base, fingerprint
from unsloth_factory.model.finite import refuse_nonfinite
from unsloth_factory.model.integrity import refuse_damaged
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.model.lora import attach_lora, load_adapter
from unsloth_factory.model.noise import quiet_libraries
from unsloth_factory.model.paths import resolve_model
from unsloth_factory.model.standard import is_prequantized, load_base, load_tokenizer
from unsloth_factory.model.tuning import check_layers, train_all, train_last_layers
from unsloth_factory.model.weight_files import read_json, shard_paths


def load_model(
    settings: ModelSettings,
    *,
    quantization_bit: int | None = None,
    dtype: torch.dtype | None = None,
    for_training: bool = False,
    tuning: TuningSettings | None = None,
    seed: int = 3407,
    device: torch.device | None = None,
    prefers: str = "standard",
) -> LoadedModel:
    """Check, load and prepare a model.

    Args:
        settings: Model, adapter, hub and engine.
        quantization_bit: 4 loads the base in NF4; None in `dtype` (`device.default_quantization` holds the policy).
        dtype: Computation dtype; None for that of `tuning`, or the device's own (`device.pick_device_dtype`).
        for_training: Make parameters trainable as `tuning` says, and switch on gradient checkpointing on a GPU (a CPU
            keeps the activations: memory is there, time is not). The model stays in evaluation mode; the loop calls
            `model.train()`.
        tuning: LoRA, full or freeze; default settings when None. With `settings.adapter` that adapter goes on training
            with its own rank and targets.
        seed: Of the initial LoRA weights.
        device: Other than the picked one.
        prefers: Engine that --engine auto takes if it can: "fast" or "standard".

    Returns:
        The model in evaluation mode. Print `engine_reason`, `device_reason` and `notes`.

    Raises:
        UserError: Anything about the files, the settings or the memory that the user can mend.
    """
    load = partial(
        _load, quantization_bit=quantization_bit, dtype=dtype, for_training=for_training,
        tuning=tuning or TuningSettings(), seed=seed, device=device, prefers=prefers,
    )  # fmt: skip
    loaded = load(settings)
    checks = loaded.engine == "fast" and (for_training or loaded.matmul != "exact") and _on_a_gpu(loaded)
    try:
        wrong = self_check.problem(loaded.decoder) if checks else None
        if wrong is None and loaded.matmul == "fp8":
            loaded.engine_reason += f"; {cost.in_words(cost.of_float8(loaded.decoder))}"
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(loaded.path, quantization_bit, loaded.device) from error
    if wrong is None:
        return loaded
    if settings.engine == "fast":
        way_out = "Use --engine standard" if loaded.matmul == "exact" else f"Leave out --matmul {loaded.matmul}"
        raise UserError(f"--engine fast does not work on {loaded.device}: {wrong}. {way_out}.")
    del loaded
    gc.collect()
    torch.cuda.empty_cache()
    loaded = load(replace(settings, engine="standard"))
    loaded.engine_reason = f"{TRANSFORMERS}; the fast engine does not work on this machine: {wrong}"
    return loaded


def _load(
    settings: ModelSettings,
    *,
    quantization_bit: int | None,
    dtype: torch.dtype | None,
    for_training: bool,
    tuning: TuningSettings,
    seed: int,
    device: torch.device | None,
    prefers: str,
) -> LoadedModel:
    """`load_model`, without the look at what the engine computes."""
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
    asked = tuning.dtype if for_training and dtype is None else "auto"
    picked_device, picked_dtype, device_reason = pick_device_dtype(asked)
    device, dtype = device or picked_device, dtype or picked_dtype
    trained = tuning if for_training else None
    engine, engine_reason = choose_engine(
        settings.engine, folder, trained, device, adapter=adapter, quantized=quantized, prefers=prefers
    )
    if settings.matmul == "fp8":
        _check_float8(quantized, device, dtype)
    if settings.max_memory is not None:
        notes += limit_memory(settings.max_memory, device)
    refuse_damaged(folder)
    refuse_nonfinite(shard_paths(folder))
    # Full training wants the stored values in float32, not what a 16-bit dtype leaves of them.
    stored = torch.float32 if tunes_base and tuning.finetuning_type == "full" else dtype
    with quiet_libraries():
        read: Callable[..., Any] = load_base
        if engine == "fast":
            keeps_embedding = tunes_base and tuning.finetuning_type == "full"
            read = partial(
                _read_fast,
                trains=for_training,
                low_memory=settings.low_memory,
                keeps_embedding=keeps_embedding,
                float8=settings.matmul == "fp8",
            )
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
            matmul=settings.matmul,
            quantization=quantization_record(folder, dtype) if quantized else None,
            notes=notes,
        )
        _prepare(loaded, adapter, tuning, for_training, seed)
    return loaded


def _on_a_gpu(loaded: LoadedModel) -> bool:
    return loaded.device.type == "cuda"


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


def _check_float8(quantized: bool, device: torch.device, dtype: torch.dtype) -> None:
    if not quantized:
        raise UsageError("--matmul fp8 is for frozen 4-bit weights: add --quantization_bit 4, or leave it out.")
    if device.type != "cuda":
        return  # computed in plain torch, to see what it does to a training
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise UsageError(
            f"--matmul fp8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} (RTX 40, H100 and later); "
            f"{name} has {found[0]}.{found[1]}. Leave it out."
        )
    if dtype != torch.bfloat16:
        raise UsageError(f"--matmul fp8 needs --dtype bfloat16, not {str(dtype).removeprefix('torch.')}.")


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
    trains: bool,
    low_memory: bool,
    keeps_embedding: bool,
    float8: bool,
) -> Any:
    """The fast engine's model."""
    from transformers import AutoConfig

    from unsloth_factory.model.fast.load import FolderWeights, load_fast
    from unsloth_factory.model.fast.planner import is_small

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    weights = FolderWeights(folder, device, dtype)
    # Training can wait for rows of the embedding to come from the CPU, a word after the other cannot.
    host_embedding = not keeps_embedding and (low_memory or (trains and is_small(device)))
    return load_fast(
        weights,
        config,
        quantized=quantization_bit is not None,
        host_embedding=host_embedding,
        recompute=low_memory,
        float8=float8,
    )


def _load_within_memory(
    read: Callable[..., Any], folder: Path, quantization_bit: int | None, device: torch.device, dtype: torch.dtype
) -> Any:
    try:
        return read(folder, quantization_bit=quantization_bit, device=device, dtype=dtype)
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(folder, quantization_bit, device) from error


def _does_not_fit(folder: Path, quantization_bit: int | None, device: torch.device) -> UserError:
    size = sum(path.stat().st_size for path in shard_paths(folder)) / 2**30
    advice = "Use a smaller model." if quantization_bit else "Use --quantization_bit 4, or a smaller model."
    return UserError(f"--model {folder} ({size:.1f} GiB on disk) does not fit on {device}. {advice}")


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
    elif for_training and loaded.engine == "fast":
        _train_weights_fast(loaded, tuning)
    elif for_training and tuning.finetuning_type == "full":
        train_all(loaded.model)
    elif for_training:
        train_last_layers(loaded.model, tuning.freeze_last_n)
    if loaded.engine == "fast":
        loaded.decoder.bind()  # lets it know the adapter
    if for_training and loaded.device.type == "cuda":
        loaded.set_gradient_checkpointing(True)
    loaded.model.eval()


def _train_weights_fast(loaded: LoadedModel, tuning: TuningSettings) -> None:
    from unsloth_factory.model.fast import trained

    if tuning.finetuning_type == "full":
        trained.train_all(loaded.model, loaded.dtype)
    else:
        check_layers(tuning.freeze_last_n, len(loaded.decoder.stack))
        trained.train_last_layers(loaded.model, tuning.freeze_last_n, loaded.dtype)
