"""Attention within the documents of a packed row by FlashAttention-4's kernels for Hopper GPUs, where it is installed.

The package `flash-attn-4` (Tri Dao and others; kernels in CuTe DSL, compiled when they are first used: 6 s). On an
H200, in one run, against torch's FlashAttention-2, 32 query and 8 key heads of 128, microseconds forwards and
backwards: documents of 1,500, 632 and 300 tokens 60 and 196 against 134 and 369; one of 4,096 222 and 701 against 504
and 1,390. Its interface is young, so each kind of heads is first tried against torch's.

Shapes: T tokens; q, out [T, Hq, D]; k, v [T, Hk, D]; lse float32 [Hq, T].
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

GENERATION = 9
"""Major compute capability for which it was measured."""
HEAD_SIZES = (64, 128)
MOST_DOCUMENTS = 256
"""With more it compiles another kernel, which must not happen while a CUDA graph is captured."""
LEAST_LONGEST = 512
"""Tokens; kernels for documents within one block of queries are others again."""
LIMIT = 0.02
"""Relative distance to FlashAttention-2. Rounding makes 0.001 forwards, 0.003 backwards."""
TRIED = (600, 1, 423)
"""Tokens of the documents that it is tried with."""
ROOM = 8
"""Numbers behind each row of its output when it is tried: in a layer that is where the LoRA product goes."""


def takes(q: torch.Tensor, k: torch.Tensor, documents: int, longest: int) -> bool:
    """Whether attention of these rows goes to FlashAttention-4.

    Args:
        q: Queries.
        k: Keys.
        documents: How many.
        longest: Tokens of the longest that attention is launched for.
    """
    if documents > MOST_DOCUMENTS or longest < LEAST_LONGEST or q.shape[2] not in HEAD_SIZES:
        return False
    return works(q.device, q.dtype, (q.shape[1], k.shape[1]), q.shape[2])


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scale: float,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of documents that begin and end at `borders`, int32 [documents + 1]; written into `out` if given."""
    out, lse, *_ = _library()._flash_attn_fwd(
        q, k, v, cu_seqlens_q=borders, cu_seqlens_k=borders, max_seqlen_q=longest, max_seqlen_k=longest,
        softmax_scale=scale, causal=True, return_lse=True, out=out,
    )  # fmt: skip
    return out, lse


def backward(
    dout: torch.Tensor,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    borders: torch.Tensor,
    longest: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv) of `inputs` q, k, v."""
    dq, dk, dv, *_ = _library()._flash_attn_bwd(
        *inputs, out, dout, lse, softmax_scale=scale, causal=True, cu_seqlens_q=borders, cu_seqlens_k=borders,
        max_seqlen_q=longest, max_seqlen_k=longest,
    )  # fmt: skip
    return dq, dk, dv


def _library() -> Any:
    _keep_compiled()
    return import_module("flash_attn.cute.interface")


def _keep_compiled() -> None:
    """Before it is imported: let it keep what it compiles, 6 s at each start otherwise.

    In the user's own folder: its default is one of /tmp, where others could lay down what would then be run. Whoever
    has set its variables keeps them; without a folder to write in nothing is kept.
    """
    try:
        folder = Path.home() / ".cache" / "unsloth_factory" / "flash_attention"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


@lru_cache
def works(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int) -> bool:
    """It is there, compiles, and computes on this device what torch does.

    The first call for each kind of heads tries it, and so must not come while a CUDA graph is captured.

    Args:
        device: A GPU.
        dtype: 16 bit.
        heads: Query and key heads.
        size: Of a head.
    """
    if torch.cuda.get_device_capability(device)[0] != GENERATION:
        return False
    try:
        return _distance(device, dtype, heads, size) < LIMIT
    except torch.OutOfMemoryError:
        raise
    except Exception:  # not installed, or whatever a compiler or another version of it throws
        return False


def _distance(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], size: int) -> float:
    """The largest relative distance of outputs and gradients to those of FlashAttention-2."""
    generator = torch.Generator(device).manual_seed(0)
    tokens = sum(TRIED)

    def numbers(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, size, generator=generator, device=device).to(dtype)

    q, k, v, dout = numbers(heads[0]), numbers(heads[1]), numbers(heads[1]), numbers(heads[0])
    borders = torch.tensor([0, *TRIED], device=device).cumsum(0).to(torch.int32)
    ends, scale = (borders, borders, tokens, tokens), size**-0.5
    room = torch.empty(tokens, heads[0] * size + ROOM, dtype=dtype, device=device)
    out, lse = forward(q, k, v, borders, tokens, scale, room[:, :-ROOM].unflatten(1, (heads[0], size)))
    gradients = backward(dout, (q, k, v), out, lse, borders, tokens, scale)
    expected, sums, *seeds, _ = torch.ops.aten._flash_attention_forward(q, k, v, *ends, 0.0, True, False, scale=scale)
    wanted = torch.ops.aten._flash_attention_backward(
        dout, q, k, v, expected, sums, *ends, 0.0, True, *seeds, scale=scale
    )
    pairs = zip((out, *gradients), (expected, *wanted), strict=True)
    return max(float((mine.float() - other.float()).norm() / other.float().norm()) for mine, other in pairs)
