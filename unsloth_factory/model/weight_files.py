"""What a model folder holds, read from the safetensors headers alone: no weight enters memory.

Layout of a safetensors file: 8 bytes little-endian header length, the header as JSON, then the tensors' bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# safetensors' own limit; a header names a few thousand tensors at most.
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """safetensors' name: BF16, F16, F32, U8, ..."""
    shape: tuple[int, ...]
    start: int
    """First byte, counted from the start of the file."""
    stop: int


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, is no JSON, or holds something else than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}. Download or copy the folder again.") from error
    if not isinstance(value, dict):
        raise UserError(
            f"{path} holds a JSON {type(value).__name__}, not an object. Download or copy the folder again."
        )
    return value


def read_header(path: Path) -> list[TensorEntry]:
    """Tensors of one safetensors file, in the order of their bytes.

    Raises:
        UserError: The file is missing, cut short, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError(f"header length {length} in a file of {size} bytes")
            header = json.loads(file.read(length))
        entries = [_entry(name, item, 8 + length) for name, item in header.items() if name != "__metadata__"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}. Download or copy it again.") from error
    entries.sort(key=lambda entry: (entry.start, entry.name))
    end = max((entry.stop for entry in entries), default=8 + length)
    if end != size:
        raise UserError(f"{path} has {size} bytes, its header describes {end}: it was cut short. Copy it again.")
    return entries


def _entry(name: str, item: dict[str, Any], data_start: int) -> TensorEntry:
    start, stop = item["data_offsets"]
    return TensorEntry(name, item["dtype"], tuple(item["shape"]), data_start + start, data_start + stop)


def shard_paths(folder: Path) -> list[Path]:
    """Weight files of a model folder in order of their names.

    Raises:
        UserError: There is none, or the index names a file that is missing or lies outside the folder.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        single = folder / SINGLE_NAME
        if not single.is_file():
            raise UserError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.")
        return [single]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map. Download or copy it again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names the weight file {name!r}; only plain *.safetensors names are read.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files in its index: {shown}. "
            "Finish the download, or copy the missing files."
        )
    return [folder / name for name in names]


def tensor_entries(folder: Path) -> Iterator[tuple[Path, TensorEntry]]:
    """(weight file, tensor) for every tensor of a model folder, shard by shard."""
    for shard in shard_paths(folder):
        for entry in read_header(shard):
            yield shard, entry
