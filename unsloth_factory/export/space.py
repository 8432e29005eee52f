"""How much disk an export needs, from shapes alone: asked before anything is written, by a plan before it trains."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from pathlib import Path

from unsloth_factory.export.base_weights import BaseTensors

BYTES_PER_WEIGHT = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32}
# Bits a weight of llama.cpp's quantised files, with the tensors that stay larger.
BITS_PER_WEIGHT = {
    "f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q5_k_s": 5.6, "q5_1": 6.0,
    "q5_0": 5.6, "q4_k_m": 4.9, "q4_k_s": 4.7, "q4_1": 5.1, "q4_0": 4.7, "iq4_nl": 4.7, "iq4_xs": 4.4, "q3_k_l": 4.3,
    "q3_k_m": 4.0, "q3_k_s": 3.7, "iq3_m": 3.8, "iq3_s": 3.6, "q2_k": 3.4,
    "q2_k_s": 3.2, "iq3_xs": 3.5, "iq3_xxs": 3.3, "iq2_m": 3.0, "iq2_s": 2.8, "iq2_xs": 2.6, "iq2_xxs": 2.4,
    "iq1_m": 2.2, "iq1_s": 2.1,
}  # fmt: skip
VOCABULARY_BYTES = 2**26  # metadata, chat template and a vocabulary of 150 thousand tokens


def stored_weights(folder: Path) -> int:
    """Number of weights of a model folder (those stored in 4 bit count as what they stand for)."""
    with BaseTensors(folder, "original", None) as tensors:
        return sum(prod(tensors.shape(name)) for name in tensors.names())


def merged_bytes(weights: int) -> int:
    """A merged model: 16 bits a weight, tokenizer files, and an output head that becomes one of its own (2 %)."""
    return int(weights * 2 * 1.02 + VOCABULARY_BYTES)


def gguf_bytes(weights: int, outtype: str) -> int:
    """One converted file."""
    return int(weights * BYTES_PER_WEIGHT[outtype]) + VOCABULARY_BYTES


def quantized_bytes(weights: int, types: Iterable[str]) -> int:
    """All quantised files together: a run that ends half way because of the next one helps nobody."""
    return sum(int(weights * BITS_PER_WEIGHT[name] / 8 * 1.05) + 2**24 for name in types)
