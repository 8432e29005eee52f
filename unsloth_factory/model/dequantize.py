"""The base weights as a QLoRA training saw them: rounded to NF4 and back.

An adapter trained on NF4 weights has learned to make up for their rounding; merged into the original weights it
misses it (loss 0.0011 against 0.0023 in a measured case). So `merge` adds the adapter to these values by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.model.foreign_code import load_config
from unsloth_factory.model.lora import linear_module_names
from unsloth_factory.model.noise import quiet_libraries
from unsloth_factory.model.standard import is_prequantized
from unsloth_factory.model.weight_files import TensorEntry, tensor_entries

# What bitsandbytes stores beside each packed weight, as `<module>.weight.<key>`.
PACKED_KEYS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
PACKED_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


def quantized_weight_names(base: Path) -> frozenset[str]:
    """Names of the weights that NF4 loading quantises: every linear layer's but the output head's.

    The architecture is built without memory for its weights.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return frozenset(f"{name}.weight" for name in linear_module_names(model))


def nf4_round_trip(weight: torch.Tensor, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Quantise to NF4 with double quantisation and back (Dettmers et al. 2023, arXiv 2305.14314).

    Bit for bit what a `Linear4bit` holds that was loaded in `dtype` on the same kind of device. Between a CPU and a GPU
    the mean of the block maxima is added up in another order, so that values may differ in their last bit.

    Args:
        weight: [out, in], any float format.
        dtype: Computation dtype of the training: the weight is rounded to it first.
        device: Where to compute.

    Returns:
        [out, in] in `dtype` on `device`.
    """
    with quiet_libraries():
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(device=device, dtype=dtype).contiguous(),
        blocksize=64,
        compress_statistics=True,
        quant_type="nf4",
        quant_storage=torch.uint8,
    )
    return dequantize_4bit(packed, state)


class BaseWeights:
    """Every tensor of a base model by its checkpoint name, one in memory at a time.

    With `quantization` the linear weights come as that training saw them; a folder that stores 4-bit weights is always
    unpacked. Memory: the tensor asked for and its packed form.
    """

    def __init__(
        self, base: Path, quantization: dict[str, Any] | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self.base = base
        self.device = device
        self._entries = {entry.name: (shard, entry) for shard, entry in tensor_entries(base)}
        self._stored = is_prequantized(base)
        self._dtype: torch.dtype | None = None
        self._rounded: frozenset[str] = frozenset()
        if quantization is not None and not self._stored:
            self._dtype = getattr(torch, quantization["dtype"])
            self._rounded = quantized_weight_names(base)
        self._open: tuple[Path, Any] | None = None

    def names(self) -> list[str]:
        """Checkpoint names in the order of the files; the parts of packed weights are left out."""
        return [name for name in self._entries if not self._is_packed_part(name)]

    def is_rounded(self, name: str) -> bool:
        """Whether `tensor(name)` has gone through 4 bits."""
        return name in self._rounded or (self._stored and self._packed_state(name) is not None)

    def entry(self, name: str) -> TensorEntry:
        """Stored dtype and shape; of a packed weight those of its packed form."""
        return self._entries[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """The values, on the CPU. A rounded weight has the training's dtype, any other the stored one."""
        state_key = self._packed_state(name) if self._stored else None
        if state_key is not None:
            return self._unpack(name, state_key)
        value = self._read(name)
        if name in self._rounded:
            assert self._dtype is not None
            return nf4_round_trip(value, self._dtype, self.device).to("cpu")
        return value

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, values) in the order of `names()`."""
        for name in self.names():
            yield name, self.tensor(name)

    def _read(self, name: str) -> torch.Tensor:
        from safetensors import safe_open

        shard = self._entries[name][0]
        if self._open is None or self._open[0] != shard:
            self._open = (shard, safe_open(shard, framework="pt", device="cpu"))
        return self._open[1].get_tensor(name)

    def _packed_state(self, name: str) -> str | None:
        return next((key for key in PACKED_STATES if f"{name}.{key}" in self._entries), None)

    def _is_packed_part(self, name: str) -> bool:
        return self._stored and any(name.endswith(f".weight.{key}") for key in PACKED_KEYS + PACKED_STATES)

    def _unpack(self, name: str, state_key: str) -> torch.Tensor:
        with quiet_libraries():
            from bitsandbytes.functional import QuantState, dequantize_4bit

        parts = {key: self._read(f"{name}.{key}") for key in PACKED_KEYS if f"{name}.{key}" in self._entries}
        parts[state_key] = self._read(f"{name}.{state_key}")
        state = QuantState.from_dict(parts, device=torch.device(self.device))
        return dequantize_4bit(self._read(name).to(self.device), state).to("cpu")
