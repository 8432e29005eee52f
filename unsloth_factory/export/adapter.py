"""A PEFT LoRA adapter read from its files: which base weights change, and by how much.

LoRA (Hu et al. 2021, arXiv 2106.09685): W' = W + s B A with s = alpha / r; rank-stabilised LoRA (Kalajdzievski 2023,
arXiv 2312.03732): s = alpha / sqrt(r). Ranks are read from the matrices themselves.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.foreign_code import refuse_adapter_code
from unsloth_factory.model.weight_files import read_json

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.(?P<kind>lora_(?:embedding_)?[AB])(?:\.weight)?$")
# Settings of adapter_config.json that are handled here, or that say nothing about the merged weights.
KNOWN_SETTINGS = {
    "peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "init_lora_weights", "runtime_config", "megatron_core", "qalora_group_size", "loftq_config",
}  # fmt: skip
# Initialisations that also change the base weights: without those the merged model would be another one.
PEFT_ALPHA = 8  # peft's default
BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "eva_residual")


@dataclass(frozen=True)
class Factors:
    """The two matrices of one module and their scale. A [r, in], B [out, r] float32 (embeddings: the same, of W^T)."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    transposed: bool

    def delta(self) -> torch.Tensor:
        """S B A in float32, shaped like the base weight."""
        product = (self.b.float() @ self.a.float()) * self.scale
        return product.T if self.transposed else product


class Adapter:
    """An adapter folder, checked: every tensor in it is understood and finite."""

    def __init__(self, folder: Path) -> None:
        """Read and check the adapter.

        Raises:
            UserError: A file is missing or damaged, a value is not finite, or the adapter uses something that cannot
                be merged here (named).
        """
        self.folder = folder
        self.config = self._read_config()
        self._refuse_unknown()
        self._factors: dict[str, dict[str, torch.Tensor]] = {}
        self.replaced: dict[str, torch.Tensor] = {}
        self._read_weights()

    def _read_config(self) -> dict[str, Any]:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (self.folder / name).is_file():
                raise UserError(f"{self.folder} is not an adapter folder: {name} is missing. Give --run or --adapter.")
        config = read_json(self.folder / CONFIG_NAME)
        refuse_adapter_code(self.folder / CONFIG_NAME, config)
        return config

    def _refuse_unknown(self) -> None:
        config = self.config
        refused = [f"{key}={config[key]!r}" for key in sorted(set(config) - KNOWN_SETTINGS) if config[key]]
        if config.get("peft_type") != "LORA":
            refused.append(f"peft_type={config.get('peft_type')!r}")
        if config.get("bias", "none") != "none":
            refused.append(f"bias={config['bias']!r}")
        initial = config.get("init_lora_weights", True)
        if isinstance(initial, str) and initial.lower().startswith(BASE_CHANGING):
            refused.append(f"init_lora_weights={initial!r} (it changes the base weights)")
        if refused:
            raise UserError(
                f"{self.folder / CONFIG_NAME}: cannot merge an adapter with {', '.join(refused)}. "
                "LoRA and rsLoRA with rank_pattern, alpha_pattern and modules_to_save can be merged; "
                "for anything else use peft's merge_and_unload."
            )

    def _read_weights(self) -> None:
        path = self.folder / WEIGHTS_NAME
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:  # safetensors raises its own type, OSError, or a plain Exception
            raise UserError(f"{path} cannot be read: {error}") from error
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise UserError(f"{path}: {name} holds NaN or infinite values. Train again with a lower learning rate.")
            short = name.removeprefix(PREFIX)
            if match := FACTOR.match(short):
                self._factors.setdefault(match["module"], {})[match["kind"]] = tensor
            elif "lora_" in short:
                raise UserError(f"{path}: cannot merge the tensor {name}. Use peft's merge_and_unload.")
            else:
                # peft also saves the base values of embeddings and heads that have LoRA on top.
                self.replaced[short.replace(".modules_to_save", "").replace(".base_layer", "")] = tensor
        incomplete = [module for module, pair in self._factors.items() if len(pair) != 2]
        if incomplete:
            raise UserError(f"{path}: {incomplete[0]} has only one of its two LoRA matrices. Copy the adapter again.")

    @property
    def changed(self) -> set[str]:
        """Base tensor names that the adapter changes or replaces."""
        return {f"{module}.weight" for module in self._factors} | set(self.replaced)

    def factors(self, name: str) -> Factors | None:
        """The LoRA matrices of the base tensor `name`, or None."""
        module = name.removesuffix(".weight")
        pair = self._factors.get(module) if name.endswith(".weight") else None
        if pair is None:
            return None
        if "lora_embedding_A" in pair:
            a, b, transposed = pair["lora_embedding_A"], pair["lora_embedding_B"], True
        else:
            a, b, transposed = pair["lora_A"], pair["lora_B"], bool(self.config.get("fan_in_fan_out"))
        return Factors(a, b, self._scale(module, a.shape[0]), transposed)

    def _scale(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r); patterns are matched as peft matches them (the whole name or its end)."""
        alpha = self.config.get("lora_alpha", PEFT_ALPHA)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the base tensor `name` must have for this adapter."""
        if name in self.replaced:
            return tuple(self.replaced[name].shape)
        factors = self.factors(name)
        assert factors is not None, name
        shape = (factors.b.shape[0], factors.a.shape[1])
        return shape[::-1] if factors.transposed else shape
