"""What a Llama-shaped decoder is made of, read from its configuration: the families differ in data, not in code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsloth_factory.kernels.nf4 import BLOCK_SIZE
from unsloth_factory.kernels.rotary import Heads

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the configurations; DeepSeek's distills are qwen2 and llama."""


@dataclass(frozen=True)
class DecoderSpec:
    """Shapes and switches of one decoder."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: Heads
    vocabulary: int
    eps: float
    """Of the norms."""
    head_norm: bool
    """Queries and keys are normed head by head (Qwen3)."""
    attention_bias: tuple[bool, bool]
    """Of the (q, k, v) and of the output projection."""
    tied: bool
    """The output projection is the embedding."""

    @classmethod
    def of(cls, config: Any) -> DecoderSpec:
        """From a transformers configuration that `why_not` has nothing against."""
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        bias = bool(getattr(config, "attention_bias", False))
        return cls(
            family=config.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=Heads(config.num_attention_heads, config.num_key_value_heads, size),
            vocabulary=config.vocab_size,
            eps=config.rms_norm_eps,
            head_norm=config.model_type == "qwen3",
            attention_bias=(True, False) if config.model_type == "qwen2" else (bias, bias),
            tied=bool(config.tie_word_embeddings),
        )


def why_not(config: Any, *, quantized: bool = False) -> str | None:
    """Why the fast engine cannot run a model, or None.

    Args:
        config: transformers' configuration.
        quantized: In NF4, whose blocks of 64 weights must not go beyond a row.
    """
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type} (it knows {', '.join(FAMILIES)})"
    if getattr(config, "hidden_act", "silu") not in ("silu", "swish"):
        return f"activation {config.hidden_act}"
    if getattr(config, "mlp_bias", False):
        return "biases in the MLP"
    spec = DecoderSpec.of(config)
    widths = (spec.hidden, spec.intermediate, spec.heads.queries * spec.heads.size)
    if quantized and any(width % BLOCK_SIZE for width in widths):
        return f"4-bit rows of {', '.join(map(str, widths))} weights (multiples of {BLOCK_SIZE} are needed)"
    window = getattr(config, "sliding_window", None)
    slides = config.model_type == "mistral" or getattr(config, "use_sliding_window", False)
    if slides and window:
        return f"attention slides over a window of {window} tokens"
    if "longrope" in str(getattr(config, "rope_parameters", "")):
        return "long rotary positions that depend on the sequence length"
    return None


class RotaryTable:
    """cos and sin of every position, float32 [positions, D/2], made by transformers' own rules (scaling included)."""

    def __init__(self, config: Any, device: torch.device) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        self._rotary = LlamaRotaryEmbedding(config).to(device)

    def of(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, float32 [T, D/2], of positions int64 [T]."""
        like = torch.empty(0, dtype=torch.float32, device=positions.device)
        cos, sin = self._rotary(like, positions[None])  # [1, T, D], both halves alike
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
