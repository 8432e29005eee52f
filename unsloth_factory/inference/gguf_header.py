"""Read the header of a GGUF file, believing nothing: each count and offset is checked against the file's size.

Native loaders and gguf-py have hung or crashed on malformed headers (llama.cpp CVE-2025-49847, gguf-py #27188), so no
loader of ours sees a file that did not pass here. Format: ggml's docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

# ggml type number -> (name, elements of one block, bytes of one block)
TENSOR_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
# A vocabulary of 256 thousand tokens makes a header of 16 MB with 0.8 million strings. A file of many gigabytes could
# hold far more, and reading that would take minutes and all memory.
MAX_HEADER_BYTES = 1 << 28
MOST = {"tensors": 1 << 16, "metadata entries": 1 << 16, "numbers": 1 << 23, "strings": 1 << 20, "arrays": 1 << 12}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file; `shape` as stored (the row length first)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata and tensor list of a GGUF file."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]

    def type_counts(self) -> dict[str, int]:
        """Tensor type name -> number of tensors, most frequent first."""
        return dict(Counter(tensor.type_name for tensor in self.tensors).most_common())


class _Cursor:
    """Reads forward through a mapped file and refuses to step over its end."""

    def __init__(self, data: mmap.mmap, fail: Callable[[str], UserError]) -> None:
        self.data, self.fail, self.at = data, fail, 0
        self.counted: Counter[str] = Counter()

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail(f"the header is cut off at byte {len(self.data)}")
        if self.at + size > MAX_HEADER_BYTES:
            raise self.fail(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def count(self, what: str, smallest: int) -> int:
        """A count of items of at least `smallest` bytes each: more than the rest of the file could hold is a lie."""
        value = self.number("<Q")
        if value * smallest > len(self.data) - self.at:
            raise self.fail(f"it announces {value} {what}, more than the file can hold")
        self.counted[what] += value
        if self.counted[what] > MOST.get(what, MAX_HEADER_BYTES):
            raise self.fail(f"it announces {value} {what}; a header holds at most {MOST.get(what, MAX_HEADER_BYTES)}")
        return value

    def string(self) -> str:
        return self.take(self.count("characters", 1)).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY or depth > 2:
            raise self.fail(f"unknown metadata type {kind}")
        inner = self.number("<I")
        if inner == STRING:
            return self._strings(self.count("strings", 8))
        if inner not in SCALARS:
            return [self.value(inner, depth + 1) for _ in range(self.count("arrays", 12))]
        code = SCALARS[inner]
        count = self.count("numbers", struct.calcsize(code))
        return list(struct.unpack(f"<{count}{code[1]}", self.take(count * struct.calcsize(code))))

    def _strings(self, count: int) -> list[str]:
        """A vocabulary has hundreds of thousands: without a function call for each."""
        texts, data, at, end = [], self.data, self.at, min(len(self.data), MAX_HEADER_BYTES)
        length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = at + 8
            at = start + length(data, at)[0] if start <= end else end + 1
            if at > end:
                raise self.fail(f"a text of its header reaches over byte {end}")
            texts.append(data[start:at].decode("utf-8", "replace"))
        self.at = at
        return texts


def read_header(path: Path) -> GgufHeader:
    """Read and check the header.

    Raises:
        UserError: The file is missing, is no GGUF, or its header and its size do not fit each other.
    """

    def fail(reason: str) -> UserError:
        return UserError(
            f"{path} is not an intact GGUF file: {reason}. Make it again (uf gguf, uf quantize), or copy it again and "
            "compare it with SHA256SUMS."
        )

    if not path.is_file():
        raise UserError(f"{path} is missing. Give the path of a GGUF file, or make one with uf gguf.")
    size = path.stat().st_size
    if size < 24:
        raise fail(f"it has {size} bytes")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _parse(_Cursor(data, fail), size)


def _parse(cursor: _Cursor, size: int) -> GgufHeader:
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise cursor.fail(f"it starts with {magic!r}, not with b'GGUF'")
    version = cursor.number("<I")
    if version not in (2, 3):
        raise cursor.fail(f"version {version} is not known here (2 and 3 are)")
    tensor_count = cursor.count("tensors", 8 + 4 + 4 + 8)
    pair_count = cursor.count("metadata entries", 8 + 4 + 1)
    metadata = {}
    for _ in range(pair_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("<I"))
    entries = [_tensor(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.fail(f"alignment {alignment} is no power of two")
    start = -(-cursor.at // alignment) * alignment
    for tensor, offset in entries:
        if start + offset + tensor.bytes > size:
            missing = start + offset + tensor.bytes - size
            raise cursor.fail(f"tensor {tensor.name} reaches {missing} bytes over the end of the file")
    return GgufHeader(version, metadata, tuple(tensor for tensor, _ in entries))


def _tensor(cursor: _Cursor) -> tuple[TensorInfo, int]:
    name = cursor.string()
    dimensions = cursor.number("<I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {name} has {dimensions} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(dimensions))
    kind, offset = cursor.number("<I"), cursor.number("<Q")
    if kind not in TENSOR_TYPES:
        raise cursor.fail(f"tensor {name} has the unknown type {kind}")
    type_name, block, block_bytes = TENSOR_TYPES[kind]
    if 0 in shape or shape[0] % block:
        raise cursor.fail(f"tensor {name} of type {type_name} has rows of {shape[0]} elements")
    return TensorInfo(name, shape, type_name, prod(shape) // block * block_bytes), offset
