"""Target: 10,000 mutated GGUF headers, no crash of this process and none that takes two seconds.

GGUF_FUZZ sets how many (400 in the test run; 10,000 by `make torture`, which sets KILLS). What our check lets through
goes on to llama.cpp in its child, a few of them here.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections import Counter
from pathlib import Path

import psutil

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp

TORTURE = "KILLS" in os.environ
COUNT = int(os.environ.get("GGUF_FUZZ", "10000" if TORTURE else "400"))
LOADED = 200 if TORTURE else 3
SECONDS, MEMORY = 2.0, 1 << 28
EXTREMES = [0, 1, 2, 0x7F, 0xFF, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


def mutate(header: bytes, chooser: random.Random) -> bytes:
    """One to four changes: bits, bytes, whole numbers, pieces cut out, doubled or moved, an early end."""
    data = bytearray(header)
    for _ in range(chooser.randint(1, 4)):
        kind = chooser.randrange(7)
        # Most decisions are made at the counts and first entries, and at the list of tensors at the end.
        first, last = range(min(len(data), 200)), range(max(0, len(data) - 2000), len(data))
        at = chooser.choice(chooser.choice((first, last, last, range(len(data)))))
        if kind == 0:
            data[at] ^= 1 << chooser.randrange(8)
        elif kind == 1:
            data[at : at + 4] = chooser.randbytes(4)
        elif kind in (2, 3):
            code = "<Q" if kind == 2 else "<I"
            value = struct.pack(code, chooser.choice(EXTREMES) & (2 ** (8 * struct.calcsize(code)) - 1))
            data[at : at + len(value)] = value
        elif kind == 4:
            del data[at : at + chooser.randint(1, 64)]
        elif kind == 5:
            piece = data[at : at + chooser.randint(1, 200)]
            data[at:at] = piece
        else:
            del data[max(24, at) :]
        data = data or bytearray(b"G")
    return bytes(data)


def header_bytes(path: Path) -> int:
    """Where the tensors' values begin, about: everything but the values."""
    return path.stat().st_size - sum(tensor.bytes for tensor in read_header(path).tensors)


def test_target_gguf_fuzz(exported, tmp_path):
    """Each mutated header is refused or read, in less than two seconds and bounded memory; no process dies of it."""
    whole = exported.gguf.read_bytes()
    cut = header_bytes(exported.gguf)
    chooser, path = random.Random(11), tmp_path / "x.gguf"
    slowest, seen, before = 0.0, Counter(), psutil.Process().memory_info().rss
    loaded = 0
    for _ in range(COUNT):
        changed = mutate(whole[:cut], chooser)
        path.write_bytes(changed)
        if chooser.random() < 0.8:
            os.truncate(path, len(whole))  # the values: a hole, zeroes; else the file ends with its header
        started = time.monotonic()
        try:
            read_header(path)
            seen["accepted"] += 1
        except UserError as error:
            seen["refused" if "is not an intact GGUF file" in str(error) else "refused for another reason"] += 1
        slowest = max(slowest, time.monotonic() - started)
        if seen["accepted"] > loaded < LOADED:
            loaded += 1
            try:
                with LlamaCpp(path, timeout=60) as llama:
                    llama.generate([5, 6], 2)
                seen["answered"] += 1
            except UserError:
                seen["refused by the child"] += 1
    grown = psutil.Process().memory_info().rss - before
    print(f"{COUNT} headers: {dict(seen)}, slowest {slowest:.3f} s, memory +{grown / 2**20:.0f} MiB")
    assert seen["accepted"] + seen["refused"] == COUNT
    assert seen["refused"] > 0.5 * COUNT
    assert loaded >= min(LOADED, 1)
    assert slowest < SECONDS
    assert grown < MEMORY
