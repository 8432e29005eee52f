"""From safetensors to the fast engine, one matrix at a time: 16-bit weights never lie in memory together.

The result is transformers' causal language model with its decoder replaced. Its linear layers remain as names that peft
hangs LoRA matrices on. Their weights are parts of the fused matrices, or in 4 bit views of one single number, so that
shapes and counts are right and no memory is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unsloth_factory.config.errors import UserError
from unsloth_factory.kernels.rotary import HeadNorm
from unsloth_factory.model.fast.decoder import FastDecoder
from unsloth_factory.model.fast.embedding import HostEmbedding
from unsloth_factory.model.fast.layer import Layer, Norms
from unsloth_factory.model.fast.linear import FusedLinear, Part
from unsloth_factory.model.fast.quantize import quantize, stack
from unsloth_factory.model.fast.spec import DecoderSpec
from unsloth_factory.model.weight_files import tensor_entries

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Projections that share their input, stored as one matrix."""


class FolderWeights:
    """Tensors of a model folder by name, each read when it is asked for."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self.folder, self.device, self.dtype = folder, device, dtype
        self._shards = {entry.name: shard for shard, entry in tensor_entries(folder)}
        self._open: dict[Path, Any] = {}

    def get(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """A tensor in the computation dtype, on the device or another one."""
        from safetensors import safe_open

        if name not in self._shards:
            raise UserError(f"--model {self.folder}: its weight files lack {name}. Copy the folder again.")
        shard = self._shards[name]
        if shard not in self._open:
            self._open[shard] = safe_open(shard, framework="pt", device="cpu")
        return self._open[shard].get_tensor(name).to(device=device or self.device).to(self.dtype)


def load_fast(
    weights: Any,
    config: Any,
    *,
    quantized: bool,
    host_embedding: bool = False,
    recompute: bool = False,
    float8: bool = False,
) -> Any:
    """Build the model from its tensors.

    Args:
        weights: `FolderWeights`, or anything else with its `get`, `device` and `dtype`.
        config: The model's transformers configuration; `spec.why_not` has nothing against it.
        quantized: NF4 with double quantisation, otherwise the computation dtype.
        host_embedding: The embedding stays in the CPU's memory, unless the output projection needs it.
        recompute: Every layer keeps its input alone.
        float8: Products with the quantised weights are computed in float8, which is not exact.

    Returns:
        transformers' causal language model whose `model` is a `FastDecoder`; nothing trains yet. After LoRA matrices
        were attached call `decoder.bind()`.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    spec = DecoderSpec.of(config)
    with torch.device("meta"):
        model = auto.from_config(config, dtype=weights.dtype)
    inner = model.model
    on_host = host_embedding and not spec.tied
    embedding = weights.get("model.embed_tokens.weight", torch.device("cpu") if on_host else None)
    _set(inner.embed_tokens, embedding)
    if on_host:  # a copy: safetensors may give the mapped file itself, whose pages the system drops and reads again
        inner.embed_tokens = HostEmbedding(embedding.clone(), weights.device)
    del embedding
    _set(inner.norm, weights.get("model.norm.weight"))
    layers = [
        _layer(inner.layers[index], f"model.layers.{index}.", weights, spec, quantized) for index in range(spec.layers)
    ]
    if spec.tied:
        model.lm_head.weight = inner.embed_tokens.weight
    else:
        _set(model.lm_head, weights.get("lm_head.weight"))
    if weights.device.type == "cuda":
        # A head that came in another dtype leaves 1.2 GB in torch's cache (Qwen3-8B), which cannot be given back once a
        # LoRA matrix lies in that block: float16 had room for 2,176 tokens in 14.2 GiB, given back at once for 2,432.
        torch.cuda.empty_cache()
    for layer in layers if float8 else ():
        for projection in layer.projections.values():
            projection.compute_in_float8()
    model.model = FastDecoder(inner, spec, layers, weights.device)
    model.model.planner.float8 = float8
    if recompute:
        model.model.planner.recompute_all()
    return model.eval().requires_grad_(False)


def _set(module: Any, weight: torch.Tensor) -> None:
    if module.weight.shape != weight.shape:
        raise UserError(
            f"A weight of shape {tuple(weight.shape)} where config.json asks for {tuple(module.weight.shape)}. "
            "Copy the model folder again."
        )
    module.weight = nn.Parameter(weight, requires_grad=False)


def _layer(names: Any, prefix: str, weights: Any, spec: DecoderSpec, quantized: bool) -> Layer:
    _set(names.input_layernorm, weights.get(f"{prefix}input_layernorm.weight"))
    _set(names.post_attention_layernorm, weights.get(f"{prefix}post_attention_layernorm.weight"))
    head = None
    if spec.head_norm:
        for which in ("q_norm", "k_norm"):
            _set(getattr(names.self_attn, which), weights.get(f"{prefix}self_attn.{which}.weight"))
        head = HeadNorm(names.self_attn.q_norm.weight, names.self_attn.k_norm.weight, spec.eps)
    norms = Norms(names.input_layernorm.weight, names.post_attention_layernorm.weight, head)
    fused = {key: _fused(names, prefix, parts, weights, quantized) for key, parts in FUSED.items()}
    return Layer(spec, norms, fused["qkv"], fused["out"], fused["gate_up"], fused["down"])


def _fused(names: Any, prefix: str, parts: Sequence[str], weights: Any, quantized: bool) -> FusedLinear:
    """One matrix of several projections; each is quantised by itself, as it would be elsewhere."""
    pieces: list[Any] = []
    biases, places, start = [], [], 0
    for part in parts:
        module = names.get_submodule(part)
        weight = weights.get(f"{prefix}{part}.weight")
        if weight.shape != module.weight.shape:
            raise UserError(
                f"{prefix}{part}.weight has shape {tuple(weight.shape)} where config.json asks for "
                f"{tuple(module.weight.shape)}. Copy the model folder again."
            )
        if module.bias is not None:
            biases.append(weights.get(f"{prefix}{part}.bias"))
            module.bias = nn.Parameter(biases[-1], requires_grad=False)
        places.append(Part(part, start, start + weight.shape[0]))
        start += weight.shape[0]
        if quantized:  # of an integer dtype: peft rounds new matrices to a floating one, which 4-bit weights have not
            one = torch.zeros(1, dtype=torch.uint8, device=weight.device)
            module.weight = nn.Parameter(one.expand(weight.shape), requires_grad=False)
        pieces.append(quantize(weight) if quantized else weight)
    bias = torch.cat(biases) if biases else None
    if quantized:
        return FusedLinear(stack(pieces), bias, places, weights.dtype)
    matrix = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    for place in places:
        names.get_submodule(place.name).weight = nn.Parameter(matrix[place.start : place.stop], requires_grad=False)
    return FusedLinear(matrix, bias, places, weights.dtype)
