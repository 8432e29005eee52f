"""Causal attention within the documents of one packed row, by the best kernel that the device has.

No T x T mask is ever made. Shapes: q and out [T, Hq, D], k and v [T, Hk, D]; query head i reads key head i Hk / Hq.
From compute capability 8.0 on torch's FlashAttention-2 (Dao 2023, arXiv 2307.08691), which takes key heads as they are,
or what `hopper` has; below it torch's memory-efficient kernel, with repeated key heads; on a CPU plain torch, one
document after the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from unsloth_factory.kernels import hopper
from unsloth_factory.kernels.launch import runs_kernels
from unsloth_factory.kernels.transfer import to_device


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row lie."""

    lengths: tuple[int, ...]
    """Tokens of each, in order."""
    borders: torch.Tensor
    """int32 [documents + 1] on the device: where each starts, and the end of the last."""

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> Documents:
        """From the lengths."""
        borders = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        borders[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return cls(tuple(lengths), to_device(borders, device))

    @property
    def longest(self) -> int:
        """Tokens of the longest."""
        return max(self.lengths)


@dataclass(frozen=True)
class Attended:
    """What the forward pass leaves for the backward one."""

    out: torch.Tensor
    """[T, Hq, D]; its rows may be parts of longer ones"""
    lse: torch.Tensor
    """float32: log of each query's sum of exponentials; its shape is the kernel's own."""
    seeds: tuple[Any, ...] = ()
    """Random state of the kernel; there is no dropout, but the backward pass wants it."""


def backend(device: torch.device) -> str:
    """Which of the three runs: "flash", "efficient" or "plain"."""
    if not runs_kernels(device):
        return "plain"
    return "flash" if torch.cuda.get_device_capability(device) >= (8, 0) else "efficient"


def prepare(heads: tuple[int, int], size: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile and try what a CUDA graph must not meet for the first time: query and key heads of `size`."""
    if backend(device) == "flash":
        hopper.works(device, dtype, heads, size)


def launches_by_tokens(heads: tuple[int, int], size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a launch depends on how many tokens and documents there are alone, not on how long the documents are.

    FlashAttention-4 does: one tile more a document at most. The others launch every document as long as the longest.
    """
    return backend(device) == "flash" and hopper.works(device, dtype, heads, size)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, out: torch.Tensor | None = None
) -> Attended:
    """softmax(q k^T / sqrt(D)) v over the earlier tokens of the same document.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        documents: Of the row.
        out: Where the result is written; its rows may be parts of longer ones.
    """
    if _goes_to_hopper(q, k, documents):
        return Attended(*hopper.forward(q, k, v, documents.borders, documents.longest, _scale(q), out))
    attended = _FORWARD[backend(q.device)](q, k, v, documents)
    return attended if out is None else replace(attended, out=out.copy_(attended.out))


def attention_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, documents: Documents
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq [T, Hq, D], dk [T, Hk, D], dv [T, Hk, D])."""
    if _goes_to_hopper(q, k, documents):
        kept = (attended.out, attended.lse)
        return hopper.backward(dout, (q, k, v), *kept, documents.borders, documents.longest, _scale(q))
    return _BACKWARD[backend(q.device)](dout, q, k, v, attended, documents)


def _goes_to_hopper(q: torch.Tensor, k: torch.Tensor, documents: Documents) -> bool:
    return backend(q.device) == "flash" and hopper.takes(q, k, len(documents.borders) - 1, documents.longest)


def _scale(q: torch.Tensor) -> float:
    return 1.0 / math.sqrt(q.shape[-1])


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> Attended:
    borders, longest = documents.borders, documents.longest
    out, lse, *seeds, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, borders, borders, longest, longest, 0.0, True, False, scale=_scale(q)
    )
    return Attended(out, lse, tuple(seeds))


def _flash_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, documents: Documents
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    borders, longest, out = documents.borders, documents.longest, attended.out.contiguous()
    return torch.ops.aten._flash_attention_backward(
        dout, q, k, v, out, attended.lse, borders, borders, longest, longest, 0.0, True,
        *attended.seeds, scale=_scale(q),
    )  # fmt: skip


CAUSAL = 1
"""custom_mask_type of the memory-efficient kernel: each document's own lower triangle."""


def _efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> Attended:
    groups = q.shape[1] // k.shape[1]
    keys, values = (_repeat(x, groups)[None] for x in (k, v))
    borders, longest = documents.borders, documents.longest
    out, lse, *seeds, _, _ = torch.ops.aten._efficient_attention_forward(
        q[None], keys, values, None, borders, borders, longest, longest, 0.0, CAUSAL, True, scale=_scale(q)
    )
    return Attended(out[0], lse, tuple(seeds))


def _efficient_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, documents: Documents
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    keys, values = (_repeat(x, groups)[None] for x in (k, v))
    borders, longest = documents.borders, documents.longest
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        dout[None], q[None], keys, values, None, attended.out.contiguous()[None], borders, borders, longest, longest,
        attended.lse, 0.0, *attended.seeds, CAUSAL, False, scale=_scale(q),
    )  # fmt: skip
    return dq[0], _sum_groups(dk[0], groups), _sum_groups(dv[0], groups)


def _repeat(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _sum_groups(x: torch.Tensor, groups: int) -> torch.Tensor:
    return x if groups == 1 else x.view(x.shape[0], -1, groups, x.shape[2]).float().sum(2).to(x.dtype)


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents) -> Attended:
    outs, lses = [], []
    for part in _parts(documents):
        scores, values = _scores(q[part], k[part]), _by_head(v[part], q.shape[1])
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append((torch.exp(scores - lse) @ values).transpose(0, 1))
        lses.append(lse)
    return Attended(torch.cat(outs).to(q.dtype), torch.cat(lses, dim=1))


def _plain_backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: Attended, documents: Documents
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    heads, scale = q.shape[1], _scale(q)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for part in _parts(documents):
        grad = dout[part].float().transpose(0, 1)  # [Hq, t, D]
        weights = torch.exp(_scores(q[part], k[part]) - attended.lse[:, part])
        dweights = grad @ _by_head(v[part], heads).transpose(1, 2)
        delta = (grad * attended.out[part].float().transpose(0, 1)).sum(-1, keepdim=True)
        dscores = weights * (dweights - delta) * scale
        dq[part] = (dscores @ _by_head(k[part], heads)).transpose(0, 1).to(q.dtype)
        dkeys = (dscores.transpose(1, 2) @ q[part].float().transpose(0, 1)).transpose(0, 1)
        dvalues = (weights.transpose(1, 2) @ grad).transpose(0, 1)
        groups = heads // k.shape[1]
        dk[part], dv[part] = _sum_groups(dkeys, groups).to(k.dtype), _sum_groups(dvalues, groups).to(v.dtype)
    return dq, dk, dv


def _parts(documents: Documents) -> list[slice]:
    starts = [0]
    for length in documents.lengths:
        starts.append(starts[-1] + length)
    return [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]


def _by_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads, t, D], float32, key heads repeated."""
    return _repeat(x, heads // x.shape[1]).float().transpose(0, 1)


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Scaled scores [Hq, t, t], -inf above the diagonal."""
    length = len(q)
    scores = _by_head(q, q.shape[1]) @ _by_head(k, q.shape[1]).transpose(1, 2) * _scale(q)
    later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(later, -math.inf)


_FORWARD = {"flash": _flash, "efficient": _efficient, "plain": _plain}
_BACKWARD = {"flash": _flash_backward, "efficient": _efficient_backward, "plain": _plain_backward}
