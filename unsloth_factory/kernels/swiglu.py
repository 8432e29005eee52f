"""SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up, with gate and up side by side in one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from unsloth_factory.kernels.launch import jit, runs_triton, tl

BLOCK = 1024
"""Elements a program handles: 4 warps of 8 elements a thread."""


@jit
def _forward_kernel(gate_up_ptr, out_ptr, stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * stride + width + columns, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * out_stride + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(dout_ptr, gate_up_ptr, out_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    left = row * stride + columns
    gate = tl.load(gate_up_ptr + left, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + left + width, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * width + columns, (silu * up).to(dtype), mask=inside)
    tl.store(gate_up_ptr + left, (dout * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(gate_up_ptr + left + width, (dout * silu).to(dtype), mask=inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Apply it to gate_up [T, 2 I], into `out` [T, I]; rows of both may be longer."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2) if out is None else out
    return launch_forward(gate_up, out) if runs_triton(gate_up) else out.copy_(twin(gate_up))


def swiglu_backward(dout: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """Return the output [T, I] once more, written over dout, and write dgate_up [T, 2 I] over gate_up.

    The gradient of the next product's LoRA needs the output; making it again here is why it is not saved. A tensor of
    its own for it would be the most that a layer needs at once: 1 GB of 40,000 tokens of Qwen3-8B.
    """
    return launch_backward(dout, gate_up) if runs_triton(gate_up) else twin_backward(dout, gate_up)


def launch_forward(gate_up: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The Triton kernel."""
    rows, width = out.shape
    _forward_kernel[(rows, -(-width // BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), width, BLOCK=BLOCK, num_warps=4
    )
    return out


def launch_backward(dout: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The Triton kernel."""
    rows, width = dout.shape
    assert dout.is_contiguous()
    # each element of dout is read by the program that writes there, before it writes
    _backward_kernel[(rows, -(-width // BLOCK))](
        dout, gate_up, dout, gate_up.stride(0), width, BLOCK=BLOCK, num_warps=4
    )
    return dout


def twin(gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def twin_backward(dout: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    """The same in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    silu = gate * sigmoid
    out = (silu * up).to(gate_up.dtype)
    dgate = dout.float() * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    gate_up.copy_(torch.cat([dgate, dout.float() * silu], dim=-1))
    return dout.copy_(out)
