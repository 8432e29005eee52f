"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), rows of h elements.

Statistics are float32; x / rms is rounded to x's dtype before the weight is applied, as transformers does it.
"""

from __future__ import annotations

import torch

from unsloth_factory.kernels.launch import jit, power_of_two, runs_triton, tl, warps_for


@jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, x_stride, y_stride, h, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < h
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    x32 = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=0) / h + eps)
    normed = (x32 * inverse).to(x.dtype)
    tl.store(y_ptr + row * y_stride + columns, (normed.to(tl.float32) * weight.to(tl.float32)).to(x.dtype), mask=inside)


@jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, residual_ptr, dx_ptr, dy_stride, x_stride, residual_stride, dx_stride, h, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < h
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0)
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x32 = x.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x32 * x32, axis=0) / h + eps)
    normed = x32 * inverse
    dnormed = dy * weight
    dx = inverse * (dnormed - normed * (tl.sum(dnormed * normed, axis=0) / h))
    if HAS_RESIDUAL:
        dx += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * dx_stride + columns, dx.to(x.dtype), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Norm x [T, h] with weight [h] into `out` [T, h], a new one where none is given; rows of both may be longer."""
    out = x.new_empty(x.shape) if out is None else out
    return launch_forward(x, weight, eps, out) if runs_triton(x) else out.copy_(twin(x, weight, eps))


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient at x [T, h], plus `residual` [T, h]: the one that reaches x by the way around the norm."""
    out = x.new_empty(x.shape) if out is None else out
    if runs_triton(x):
        return launch_backward(dy, x, weight, eps, residual, out)
    return out.copy_(twin_backward(dy, x, weight, eps, residual))


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, eps: float) -> torch.Tensor:
    """dw, float32 [h]; for full fine-tuning alone, so plain torch is enough."""
    return (dy.float() * _normed(x, eps)[0].to(x.dtype).float()).sum(0)


def launch_forward(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> torch.Tensor:
    """The Triton kernel."""
    rows, h = x.shape
    block = power_of_two(h)
    _forward_kernel[(rows,)](
        x, weight, out, x.stride(0), out.stride(0), h, eps, BLOCK=block, num_warps=warps_for(block)
    )
    return out


def launch_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """The Triton kernel."""
    rows, h = x.shape
    block = power_of_two(h)
    around = dy if residual is None else residual
    _backward_kernel[(rows,)](
        dy, x, weight, around, out, dy.stride(0), x.stride(0), around.stride(0), out.stride(0), h, eps,
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out


def _normed(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    x32 = x.float()
    inverse = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)
    return x32 * inverse, inverse


def twin(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The same in plain torch; rows of any leading shape."""
    return _normed(x, eps)[0].to(x.dtype) * weight.to(x.dtype)


def twin_backward(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None
) -> torch.Tensor:
    """The same in plain torch; rows of any leading shape."""
    normed, inverse = _normed(x, eps)
    dnormed = dy.float() * weight.float()
    dx = inverse * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + residual.float()
    return dx.to(x.dtype)
