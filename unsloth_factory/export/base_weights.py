"""The values that an adapter is added to: the base as stored, or as a QLoRA training saw it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.export.weights import WeightFolder
from unsloth_factory.model.dequantize import PACKED_STATES, BaseWeights
from unsloth_factory.model.standard import is_prequantized
from unsloth_factory.model.weight_files import read_json

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def default_kind(base: Path, quantization: dict[str, Any] | None) -> str:
    """`as_trained` for an adapter of a QLoRA training, else `original` (see `BaseTensors`)."""
    return "as_trained" if quantization is not None and not is_prequantized(base) else "original"


class BaseTensors:
    """Base tensors by checkpoint name, one in memory at a time. A context manager.

    `kind` original: as stored (weights stored in 4 bit are unpacked). as_trained: the linear layers rounded to NF4 and
    back, exactly as the training did.
    """

    def __init__(self, folder: Path, kind: str, quantization: dict[str, Any] | None) -> None:
        """Open the folder.

        Raises:
            UserError: `as_trained` is asked for weights that were never quantised to NF4.
        """
        self.folder, self.kind = folder, kind
        if kind == "as_trained" and quantization is None:
            raise UserError(f"--base_weights as_trained: the adapter does not say how {folder} was quantised.")
        rounding = quantization if kind == "as_trained" else None
        if rounding and (rounding.get("bits") != 4 or rounding.get("type") != "nf4"):
            raise UserError(
                f"--base_weights as_trained: the base was quantised as {rounding}, only 4-bit NF4 can be repeated. "
                "Use --base_weights original."
            )
        # The GPU rounds some block means differently in the last bit: repeat it where the training most likely was.
        self._weights = BaseWeights(folder, rounding, "cuda" if rounding and torch.cuda.is_available() else "cpu")
        self._files = WeightFolder(folder)
        self._names = dict.fromkeys(self._weights.names())
        self._config = read_json(folder / "config.json")

    def __enter__(self) -> BaseTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.__exit__(*exception)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """Names of the unpacked tensors, in the files' order."""
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the unpacked tensor, from headers alone."""
        for state in PACKED_STATES:
            if f"{name}.{state}" in self._files:
                text = bytes(self._files.tensor(f"{name}.{state}").numpy()).decode("utf-8")
                return tuple(json.loads(text)["shape"])
        return self._weights.entry(name).shape

    def tensor(self, name: str) -> torch.Tensor:
        """The values, on the CPU. Raises KeyError for a name that is not stored."""
        if name not in self:
            raise KeyError(name)
        return self._weights.tensor(name)

    def tied_source(self, name: str) -> str | None:
        """The embedding that stands for a tied output head that is not stored; None for any other name."""
        tied = self._config.get("tie_word_embeddings", False)
        return EMBEDDING if tied and name == HEAD and HEAD not in self and EMBEDDING in self else None
