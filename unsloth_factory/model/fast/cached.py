"""Generation and scoring with a key/value cache through the same layers.

Shapes: B rows padded on the left, T new tokens a row, S tokens in the cache after them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from unsloth_factory.kernels import rms_norm, rotary
from unsloth_factory.model.fast.layer import Layer

if TYPE_CHECKING:
    from unsloth_factory.model.fast.decoder import FastDecoder


def cached_forward(
    decoder: FastDecoder,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """Normed hidden states [B, T, h] of the new tokens; the cache grows by them."""
    batch, new = input_ids.shape
    past = cache.get_seq_length()
    if position_ids is None:
        position_ids = torch.arange(past, past + new, device=input_ids.device).expand(batch, new)
    mask = _mask(attention_mask, past, new, input_ids.device)
    x = decoder.embed(input_ids).reshape(batch * new, -1)
    cos, sin = decoder.table.of(position_ids.reshape(-1))
    for index, layer in enumerate(decoder.stack):
        x = _layer(layer, x, (cos, sin), mask, (cache, index, batch), decoder.lora)
    return rms_norm.rms_norm(x, decoder.norm.weight, decoder.spec.eps).view(batch, new, -1)


def _mask(attention_mask: torch.Tensor | None, past: int, new: int, device: torch.device) -> torch.Tensor | None:
    """Which cached tokens each new one may read, [B or 1, 1, T, S], bool or added; None where each reads all."""
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    padded = attention_mask is not None and bool((attention_mask == 0).any())
    if new == 1 and not padded:
        return None
    earlier = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)
    if not padded:
        return earlier[None, None]
    assert attention_mask is not None
    allowed = earlier[None] & attention_mask.bool()[:, None, :]
    # a padding token reads itself, or its softmax over nothing would be NaN
    allowed |= torch.eye(new, past + new, dtype=torch.bool, device=device).roll(past, 1)[None]
    return allowed[:, None]


def _layer(
    layer: Layer,
    x: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    place: tuple[Any, int, int],
    lora: bool,
) -> torch.Tensor:
    heads = layer.spec.heads
    cache, index, batch = place
    qkv = layer.qkv.forward(layer.normed(x, layer.norms.attention, layer.qkv), lora=lora)
    q, k = rotary.rotary(qkv, *angles, heads, layer.norms.head)
    v = rotary.split(qkv, heads)[2]
    q, k, v = (part.reshape(batch, -1, *part.shape[1:]).transpose(1, 2) for part in (q, k, v))
    k, v = cache.update(k, v, index)
    groups = heads.queries // heads.keys
    if groups > 1:
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return layer.after_attention(x, attended.transpose(1, 2).reshape(len(x), -1), lora)
