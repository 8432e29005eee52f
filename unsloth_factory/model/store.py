"""Write adapters and fully trained models, in the formats that everyone else reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterInfo, write_adapter_info
from unsloth_factory.model.finite import is_finite
from unsloth_factory.model.foreign_code import refuse_foreign_link
from unsloth_factory.model.lora import adapter_state
from unsloth_factory.model.weight_files import INDEX_NAME, read_json
from unsloth_factory.run.atomic import (
    discard,
    own_partial,
    partial,
    publish_file,
    publish_folder,
    remove_leftovers,
    require_free_space,
    write_json,
    write_sums,
)

# Everything beside weights and config.json that a model needs to be used: copied byte for byte from the base.
AUXILIARY_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "generation_config.json",
    "*.model",
)
FLOAT16_MAX = 65504.0


def copy_auxiliary(base: Path, folder: Path) -> list[str]:
    """Copy tokenizer, chat template and generation settings unchanged; returns the names.

    Raises:
        UserError: One of them is a link that leaves the folder.
    """
    return copy_matching(base, folder, AUXILIARY_PATTERNS)


def copy_matching(base: Path, folder: Path, patterns: Iterable[str]) -> list[str]:
    """Copy files and folders by name patterns; returns the names.

    Raises:
        UserError: One of them is a link that leaves the folder.
    """
    names = sorted({path.name for pattern in patterns for path in base.glob(pattern)})
    for name in names:
        inner = (base / name).rglob("*") if (base / name).is_dir() else ()
        for path in (base / name, *inner):
            refuse_foreign_link(base, path)
        if (base / name).is_dir():
            shutil.copytree(base / name, folder / name, dirs_exist_ok=True)
        else:
            shutil.copyfile(base / name, folder / name)
    return names


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Write one safetensors file atomically, readable for all."""
    from safetensors.torch import save_file

    temporary = partial(path)
    try:
        save_file(tensors, str(temporary), metadata={"format": "pt"})
        return publish_file(temporary, path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_adapter(peft_model: Any, folder: Path, info: AdapterInfo) -> Path:
    """Write a PEFT adapter and what it remembers; the same weights give the same bytes.

    The folder appears at once, with the SHA-256 of each file; an adapter that was there before is replaced.

    Raises:
        UserError: The adapter holds NaN or infinity (nothing is written), or the disk is full.
    """
    state = adapter_state(peft_model)
    bad = [name for name, tensor in state.items() if not is_finite(tensor)]
    if bad:
        raise UserError(f"the adapter is not saved: {bad[0]} holds NaN or infinity, so the training has diverged.")
    require_free_space(folder, sum(t.numel() * t.element_size() for t in state.values()), "the adapter")
    with _new_folder(folder) as temporary:
        save_tensors(temporary / ADAPTER_WEIGHTS, state)
        write_adapter_info(temporary, info)
        write_json(temporary / ADAPTER_CONFIG, _portable_config(peft_model, info.base_model))
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its checksums and its name when the block was left without an error."""
    temporary = own_partial(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        temporary.mkdir()
        yield temporary
        write_sums(temporary, [path.relative_to(temporary).as_posix() for path in files_below(temporary)])
        publish_folder(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        discard(temporary)


def files_below(folder: Path) -> list[Path]:
    """All files of a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _portable_config(peft_model: Any, base_model: str) -> dict[str, Any]:
    """adapter_config.json as peft writes it, but sorted, and without what only this machine knows."""
    config = peft_model.peft_config["default"].to_dict()
    config["base_model_name_or_path"] = base_model
    config["inference_mode"] = True
    config["revision"] = None
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(config.get(key), (set, list, tuple)):
            config[key] = sorted(config[key])
    return json.loads(json.dumps(config, sort_keys=True, default=str))


def save_full(model: Any, base: Path, folder: Path, *, max_shard_bytes: int = 4 * 2**30) -> Path:
    """Write a fully trained model as 16-bit safetensors with the base's tokenizer files; the folder appears at once.

    Weights are stored as float16 (11 significant bits), or all as bfloat16 (8 bits) when one of them is too large
    for float16. Besides the model one shard is in memory.

    Raises:
        UserError: Weights that are not finite (nothing is written), or not enough disk.
    """
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    dtype = _storage_dtype(tensors)
    require_free_space(folder, sum(2 * t.numel() for t in tensors.values()), "the trained model")
    with _new_folder(folder) as temporary:
        _write_shards(tensors, temporary, dtype, max_shard_bytes)
        copy_auxiliary(base, temporary)
        config = read_json(base / "config.json")
        config.pop("torch_dtype", None)
        write_json(temporary / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    return folder


def _storage_dtype(tensors: dict[str, torch.Tensor]) -> torch.dtype:
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise UserError(f"the model is not saved: {bad[0]} holds NaN or infinity, so the training has diverged.")
    largest = max(float(tensor.abs().max()) for tensor in tensors.values())
    return torch.float16 if largest <= FLOAT16_MAX else torch.bfloat16


def _write_shards(tensors: dict[str, torch.Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + 2 * tensor.numel() > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += 2 * tensor.numel()
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
        total = sum(2 * tensor.numel() for tensor in tensors.values())
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for name, group in zip(names, groups, strict=True):
        save_tensors(folder / name, {key: tensors[key].to("cpu", dtype).contiguous() for key in group})
