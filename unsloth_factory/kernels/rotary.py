"""Head norm (Qwen3) and rotary positions (Su et al. 2021, arXiv 2104.09864) of queries and keys, in one pass.

The fused projection gives qkv [T, (Hq + 2 Hk) D]: Hq query heads, Hk key heads, Hk value heads of D elements. Rotation
pairs element i with i + D/2, by the angles of cos and sin, float32 [T, D/2].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth_factory.kernels import rms_norm
from unsloth_factory.kernels.launch import jit, power_of_two, runs_triton, tl


@dataclass(frozen=True)
class Heads:
    """How a row of qkv is divided."""

    queries: int
    keys: int
    """Key heads; there are as many value heads."""
    size: int
    """Elements of a head."""

    @property
    def width(self) -> int:
        """Elements of a row."""
        return (self.queries + 2 * self.keys) * self.size


@dataclass(frozen=True)
class HeadNorm:
    """Qwen3 norms every query and key head before the rotation."""

    query_weight: torch.Tensor
    """[D]"""
    key_weight: torch.Tensor
    """[D]"""
    eps: float


@jit
def _forward_kernel(
    qkv_ptr, cos_ptr, sin_ptr, query_weight_ptr, key_weight_ptr, q_ptr, k_ptr,
    stride, eps, QUERIES: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_query = head < QUERIES
    inside = (head < QUERIES + KEYS) & (column < D // 2)
    source = qkv_ptr + token * stride + head * D + column
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + D // 2, mask=inside, other=0.0).to(tl.float32)
    dtype = q_ptr.dtype.element_ty
    if NORM:
        inverse = 1.0 / tl.sqrt((tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / D + eps)
        inverse = inverse[:, None]
        use = (head < QUERIES + KEYS) & (column < D // 2)
        weight1 = tl.load(query_weight_ptr + column + 0 * head, mask=use & is_query, other=0.0).to(tl.float32)
        weight1 += tl.load(key_weight_ptr + column + 0 * head, mask=use & (head >= QUERIES), other=0.0).to(tl.float32)
        weight2 = tl.load(query_weight_ptr + D // 2 + column + 0 * head, mask=use & is_query, other=0.0).to(tl.float32)
        weight2 += tl.load(key_weight_ptr + D // 2 + column + 0 * head, mask=use & (head >= QUERIES), other=0.0).to(
            tl.float32
        )
        first = first * inverse * weight1
        second = second * inverse * weight2
    cos = tl.load(cos_ptr + token * (D // 2) + column, mask=column < D // 2, other=0.0)
    sin = tl.load(sin_ptr + token * (D // 2) + column, mask=column < D // 2, other=0.0)
    out1 = (first * cos - second * sin).to(dtype)
    out2 = (second * cos + first * sin).to(dtype)
    q = q_ptr + token * QUERIES * D + head * D + column
    tl.store(q, out1, mask=inside & is_query)
    tl.store(q + D // 2, out2, mask=inside & is_query)
    k = k_ptr + token * KEYS * D + (head - QUERIES) * D + column
    tl.store(k, out1, mask=inside & (head >= QUERIES))
    tl.store(k + D // 2, out2, mask=inside & (head >= QUERIES))


@jit
def _backward_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, query_weight_ptr,
    key_weight_ptr, stride, eps, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_query = head < QUERIES
    is_key = (head >= QUERIES) & (head < QUERIES + KEYS)
    is_value = (head >= QUERIES + KEYS) & (head < QUERIES + 2 * KEYS)
    inside = column < D // 2
    dq = dq_ptr + token * QUERIES * D + head * D + column
    dk = dk_ptr + token * KEYS * D + (head - QUERIES) * D + column
    dv = dv_ptr + token * KEYS * D + (head - QUERIES - KEYS) * D + column
    d1 = tl.load(dq, mask=inside & is_query, other=0.0).to(tl.float32)
    d1 += tl.load(dk, mask=inside & is_key, other=0.0).to(tl.float32)
    d1 += tl.load(dv, mask=inside & is_value, other=0.0).to(tl.float32)
    d2 = tl.load(dq + D // 2, mask=inside & is_query, other=0.0).to(tl.float32)
    d2 += tl.load(dk + D // 2, mask=inside & is_key, other=0.0).to(tl.float32)
    d2 += tl.load(dv + D // 2, mask=inside & is_value, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * (D // 2) + column, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * (D // 2) + column, mask=inside, other=0.0)
    turned = is_query | is_key
    r1 = tl.where(turned, d1 * cos + d2 * sin, d1)
    r2 = tl.where(turned, d2 * cos - d1 * sin, d2)
    place = token * stride + head * D + column
    if NORM:
        x1 = tl.load(qkv_ptr + place, mask=inside & turned, other=0.0).to(tl.float32)
        x2 = tl.load(qkv_ptr + place + D // 2, mask=inside & turned, other=0.0).to(tl.float32)
        inverse = 1.0 / tl.sqrt((tl.sum(x1 * x1, axis=1) + tl.sum(x2 * x2, axis=1)) / D + eps)
        inverse = inverse[:, None]
        weight1 = tl.load(query_weight_ptr + column + 0 * head, mask=inside & is_query, other=0.0).to(tl.float32)
        weight1 += tl.load(key_weight_ptr + column + 0 * head, mask=inside & is_key, other=0.0).to(tl.float32)
        weight2 = tl.load(query_weight_ptr + D // 2 + column + 0 * head, mask=inside & is_query, other=0.0).to(
            tl.float32
        )
        weight2 += tl.load(key_weight_ptr + D // 2 + column + 0 * head, mask=inside & is_key, other=0.0).to(tl.float32)
        g1 = r1 * weight1
        g2 = r2 * weight2
        n1 = x1 * inverse
        n2 = x2 * inverse
        mean = ((tl.sum(g1 * n1, axis=1) + tl.sum(g2 * n2, axis=1)) / D)[:, None]
        r1 = tl.where(turned, inverse * (g1 - n1 * mean), r1)
        r2 = tl.where(turned, inverse * (g2 - n2 * mean), r2)
    dtype = qkv_ptr.dtype.element_ty
    written = inside & (head < QUERIES + 2 * KEYS)
    tl.debug_barrier()  # all of the token is read before any of it is overwritten
    tl.store(qkv_ptr + place, r1.to(dtype), mask=written)
    tl.store(qkv_ptr + place + D // 2, r2.to(dtype), mask=written)


def rotary(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q [T, Hq, D], k [T, Hk, D]) of qkv, normed where `norm` is given, and rotated."""
    if runs_triton(qkv):
        return launch_forward(qkv, cos, sin, heads, norm)
    return twin(qkv, cos, sin, heads, norm)


def rotary_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """Write dqkv [T, (Hq + 2 Hk) D], of dq [T, Hq, D], dk and dv [T, Hk, D], over qkv."""
    if runs_triton(qkv):
        return launch_backward(gradients, qkv, cos, sin, heads, norm)
    return qkv.copy_(twin_backward(gradients, qkv, cos, sin, heads, norm))


def head_norm_gradients(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of both weights of the head norm, float32 [D]; for full fine-tuning alone, so plain torch is enough."""
    q, k, _ = split(qkv, heads)
    dq, dk = (_turn(one.float(), cos, -sin).flatten(0, 1) for one in gradients[:2])
    queries = rms_norm.weight_gradient(dq, q.flatten(0, 1), norm.eps)
    return queries, rms_norm.weight_gradient(dk, k.flatten(0, 1), norm.eps)


def _grid(heads: Heads, rows: int) -> dict[str, int]:
    block = power_of_two(rows)
    half = power_of_two(heads.size // 2)
    return {
        "QUERIES": heads.queries, "KEYS": heads.keys, "D": heads.size, "HALF": half, "ROWS": block,
        "num_warps": min(8, max(1, block * half // 512)),
    }  # fmt: skip


def launch_forward(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The Triton kernel."""
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, heads.queries, heads.size)
    k = qkv.new_empty(tokens, heads.keys, heads.size)
    weights = (norm.query_weight, norm.key_weight, norm.eps) if norm else (cos, cos, 0.0)
    _forward_kernel[(tokens,)](
        qkv, cos, sin, weights[0], weights[1], q, k, qkv.stride(0), weights[2],
        NORM=norm is not None, **_grid(heads, heads.queries + heads.keys),
    )  # fmt: skip
    return q, k


def launch_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """The Triton kernel."""
    weights = (norm.query_weight, norm.key_weight, norm.eps) if norm else (cos, cos, 0.0)
    gradients = tuple(gradient.contiguous() for gradient in gradients)  # type: ignore[assignment]
    _backward_kernel[(qkv.shape[0],)](
        *gradients, qkv, cos, sin, weights[0], weights[1], qkv.stride(0), weights[2],
        NORM=norm is not None, **_grid(heads, heads.queries + 2 * heads.keys),
    )  # fmt: skip
    return qkv


def split(qkv: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views (q [T, Hq, D], k [T, Hk, D], v [T, Hk, D]) of a fused row."""
    parts = qkv.view(qkv.shape[0], heads.queries + 2 * heads.keys, heads.size)
    q, k, v = parts.split([heads.queries, heads.keys, heads.keys], dim=1)
    return q, k, v


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, H, D], float32; with -sin it is turned back."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def twin(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: Heads, norm: HeadNorm | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain torch."""
    q, k, _ = (part.float() for part in split(qkv, heads))
    if norm is not None:
        q = rms_norm.twin(q, norm.query_weight.float(), norm.eps)
        k = rms_norm.twin(k, norm.key_weight.float(), norm.eps)
    return _turn(q, cos, sin).to(qkv.dtype), _turn(k, cos, sin).to(qkv.dtype)


def twin_backward(
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: Heads,
    norm: HeadNorm | None,
) -> torch.Tensor:
    """The same in plain torch."""
    q, k, _ = (part.float() for part in split(qkv, heads))
    dq, dk = _turn(gradients[0].float(), cos, -sin), _turn(gradients[1].float(), cos, -sin)
    if norm is not None:
        dq = rms_norm.twin_backward(dq, q, norm.query_weight, norm.eps, None)
        dk = rms_norm.twin_backward(dk, k, norm.key_weight, norm.eps, None)
    return torch.cat([dq, dk, gradients[2].float()], dim=1).flatten(1).to(qkv.dtype)
