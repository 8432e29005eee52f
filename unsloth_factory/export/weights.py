"""Read safetensors one tensor at a time, and write them as a stream: never a whole model in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.weight_files import INDEX_NAME, SINGLE_NAME, TensorEntry, tensor_entries

DTYPE_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "B": 1}


class WeightFolder:
    """The safetensors of a model folder, opened lazily. A context manager; tensors are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """List the tensors from the files' headers.

        Raises:
            UserError: There are no weight files, one is missing, or one is damaged.
        """
        self.folder = folder
        self._entries = {entry.name: (path, entry) for path, entry in tensor_entries(folder)}
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        """Tensor names in the files' order."""
        return list(self._entries)

    def entry(self, name: str) -> TensorEntry:
        """Shape and stored type, from the header."""
        return self._entries[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as stored. Raises KeyError for a name that is not."""
        path = self._entries[name][0]
        if path not in self._open:
            self._open[path] = self._stack.enter_context(safe_open(path, framework="pt"))
        return self._open[path].get_tensor(name)


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write: where it will lie and how large it is."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of values."""
        return prod(self.shape)


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GB or 500MB (decimal) or 2GiB.

    Raises:
        UserError: It is no size.
    """
    value = text.strip().upper()
    for unit in sorted(UNITS, key=len, reverse=True):
        if value.endswith(unit):
            try:
                number = float(value[: -len(unit)])
            except ValueError:
                break
            if number > 0:
                return int(number * UNITS[unit])
    raise UserError(f"--max_shard_size {text}: not a size. Write it like 4GB or 500MB.")


def plan_shards(tensors: list[OutputTensor], max_bytes: int, itemsize: int) -> list[list[OutputTensor]]:
    """Split tensors, in order, into shards of at most `max_bytes` (a larger tensor has a shard of its own)."""
    shards: list[list[OutputTensor]] = [[]]
    size = 0
    for tensor in tensors:
        bytes_needed = tensor.elements * itemsize
        if shards[-1] and size + bytes_needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += bytes_needed
    return shards


def write_shards(
    folder: Path,
    shards: list[list[OutputTensor]],
    dtype: torch.dtype,
    produce: Callable[[str], torch.Tensor],
) -> Iterator[int]:
    """Write the shard files and their index; yields the bytes of each tensor after it is on its way to the disk.

    The safetensors layout is a header with all names and offsets, then the bytes in that order; the header is known
    before any value, so one tensor at a time is in memory.
    """
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
        with open(folder / name, "wb") as file:
            file.write(_header(shard, dtype))
            for tensor in shard:
                value = produce(tensor.name).to(dtype).contiguous()
                assert tuple(value.shape) == tensor.shape, (tensor, value.shape)
                file.write(value.reshape(-1).view(torch.uint8).numpy().data)
                yield value.numel() * value.element_size()
            file.flush()
            # Written pages count as ours until they are on the disk; a large model must not fill the page cache.
            os.fsync(file.fileno())
    if len(shards) > 1:
        total = sum(tensor.elements for shard in shards for tensor in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(shard: list[OutputTensor], dtype: torch.dtype) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in shard:
        end = offset + tensor.elements * dtype.itemsize
        entries[tensor.name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the values start 8-byte aligned
    return len(text).to_bytes(8, "little") + text
