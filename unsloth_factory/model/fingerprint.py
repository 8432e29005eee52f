"""Which base weights an adapter belongs to.

A LoRA adapter is a difference; added to other weights of the same shape it gives a model that answers, wrongly. So an
adapter records the fingerprint of its base in `unsloth_factory.json`, and is refused on any other.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.foreign_code import refuse_adapter_code
from unsloth_factory.model.integrity import refuse_damaged
from unsloth_factory.model.weight_files import TensorEntry, read_header, read_json, shard_paths, tensor_entries
from unsloth_factory.run.atomic import write_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_INFO = "unsloth_factory.json"
PEFT_PREFIX = "base_model.model."
# Who wrote the file and how it is run; everything else in config.json can change what the weights compute.
IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version", "use_cache", "architectures")
# Files up to this size are hashed whole (the bundled model: 10 ms).
WHOLE_FILE_BYTES = 16 * 2**20
# Bytes taken at the start, middle and end of every tensor of a larger file: 5 MB of Qwen3-8B's 16 GB.
WINDOW_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """What an adapter remembers of the training that made it; `unsloth_factory.json` beside its weights."""

    base_model: str
    """What --model said."""
    base_fingerprint: str
    quantization: dict[str, Any] | None = None
    """bits, type, double, blocksize and dtype of the base during training; None for 16/32-bit weights."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What the training adds, such as the thinking mode."""


def fingerprint(folder: Path) -> str:
    """Identity of a model's weights and architecture, SHA-256 in hex.

    It covers config.json (but for names and versions), every safetensors header, and of each weight file all bytes up
    to 16 MiB, or else the first, middle and last 4 KiB of every tensor. It does not depend on the folder's name.
    """
    digest = hashlib.sha256()
    config = read_json(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG_KEYS}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for shard in shard_paths(folder):
        entries = read_header(shard)
        digest.update(f"\n{shard.name} {shard.stat().st_size}\n".encode())
        with open(shard, "rb") as file:
            _add_samples(digest, file, entries, shard.stat().st_size)
    return digest.hexdigest()


def _add_samples(digest: Any, file: BinaryIO, entries: list[TensorEntry], size: int) -> None:
    if size <= WHOLE_FILE_BYTES:
        digest.update(file.read())
        return
    for entry in entries:
        digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
        middle = (entry.start + entry.stop) // 2
        for start in (entry.start, middle, max(entry.start, entry.stop - WINDOW_BYTES)):
            file.seek(start)
            digest.update(file.read(min(WINDOW_BYTES, entry.stop - start)))


def write_adapter_info(folder: Path, info: AdapterInfo) -> Path:
    """Write `unsloth_factory.json` into an adapter's folder, atomically."""
    return write_json(folder / ADAPTER_INFO, {"format": 1, **asdict(info)})


def read_adapter_info(adapter: Path) -> AdapterInfo | None:
    """What the adapter remembers; None for an adapter that another program wrote.

    Raises:
        UserError: The file is there but unreadable.
    """
    path = adapter / ADAPTER_INFO
    if not path.is_file():
        return None
    values = read_json(path)
    known = {f.name for f in fields(AdapterInfo)}
    try:
        info = AdapterInfo(**{key: value for key, value in values.items() if key in known})
    except TypeError as error:
        raise UserError(f"{path} cannot be read: {error}. Copy the adapter again.") from error
    return info


def check_adapter_folder(adapter: Path) -> Path:
    """Refuse what is not a LoRA adapter in safetensors; return the folder.

    Raises:
        UserError: With the file, the reason and what to do.
    """
    if not adapter.is_dir():
        raise UserError(f"--adapter {adapter}: no such folder.")
    config_path = adapter / ADAPTER_CONFIG
    if not config_path.is_file():
        inner = next((name for name in ("final_adapter",) if (adapter / name / ADAPTER_CONFIG).is_file()), None)
        hint = f" Did you mean {adapter / inner}?" if inner else ""
        raise UserError(f"--adapter {adapter} has no {ADAPTER_CONFIG}: it is not a PEFT adapter.{hint}")
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise UserError(
            f"--adapter {adapter} has no {ADAPTER_WEIGHTS}. Adapters in pickle files (adapter_model.bin) are never "
            "read; save it again with safe_serialization."
        )
    config = read_json(config_path)
    refuse_adapter_code(config_path, config)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{config_path}: peft_type is {kind}; only LORA adapters can be loaded, merged and exported.")
    read_header(adapter / ADAPTER_WEIGHTS)
    refuse_damaged(adapter)
    return adapter


def check_adapter_base(adapter: Path, base: Path, base_fingerprint: str, base_name: str) -> list[str]:
    """Refuse an adapter that was trained on another base.

    Args:
        adapter: Folder of the adapter.
        base: Folder of the base weights that it would be put on.
        base_fingerprint: `fingerprint(base)`.
        base_name: What the user called the base, for the message.

    Returns:
        Warnings to print; empty when the adapter names exactly this base.

    Raises:
        UserError: It names another base, or its shapes do not fit.
    """
    info = read_adapter_info(check_adapter_folder(adapter))
    if info is None:
        _check_shapes(adapter, base)
        return [
            f"{adapter} does not say which weights it was trained on (no {ADAPTER_INFO}); its shapes fit {base_name}, "
            "which is all that can be checked."
        ]
    if info.base_fingerprint != base_fingerprint:
        raise UserError(
            f"--adapter {adapter} was trained on {info.base_model} (fingerprint {info.base_fingerprint[:12]}), but "
            f"--model is {base_name} (fingerprint {base_fingerprint[:12]}). Give --model {info.base_model}, unchanged "
            "since that training."
        )
    return []


def _check_shapes(adapter: Path, base: Path) -> None:
    """Compare a foreign adapter's matrices, A [r, in] and B [out, r], with the base's weights [out, in]."""
    if "quantization_config" in read_json(base / "config.json"):
        return  # stored packed, without their shapes; peft refuses a misfit when it loads the adapter
    shapes = {entry.name: entry.shape for _, entry in tensor_entries(base)}
    for entry in read_header(adapter / ADAPTER_WEIGHTS):
        module, _, role = entry.name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if role not in ("A.weight", "B.weight"):
            continue
        shape = shapes.get(f"{module}.weight")
        if shape is None:
            raise UserError(
                f"--adapter {adapter}: its module {module} is not in the model {base}: it is for another base."
            )
        wanted = shape[1] if role == "A.weight" else shape[0]
        given = entry.shape[1] if role == "A.weight" else entry.shape[0]
        if given != wanted:
            raise UserError(
                f"--adapter {adapter}: {entry.name} has shape {list(entry.shape)}, the model's {module} is "
                f"{list(shape)}: it is for another base."
            )
