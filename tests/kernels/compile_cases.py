"""Compiles every kernel for a GPU that is not there, with the shapes of an 8B model: `python compile_cases.py 75`.

Triton needs no GPU to compile, only to be told for which. Run by test_kernels.py, one compute capability a process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from unsloth_factory.kernels import (  # noqa: E402
    cross_entropy,
    dropout,
    float8,
    nf4,
    nf4_float8,
    rms_norm,
    rotary,
    shadows,
    swiglu,
)

HIDDEN, WIDTH, VOCABULARY, ROOM = 4096, 12288, 151_936, 16
HEADS = rotary.Heads(32, 8, 128)


class NoGpu:
    """As much of Triton's driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int) -> list[Any]:
    """From now on a launch compiles its kernel and does nothing else; collects what was compiled."""
    import triton
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(NoGpu(capability))
    made, run = [], JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made.append(run(self, *args, grid=grid, warmup=True, **options))
        return made[-1]

    JITFunction.run = compiled
    return made


def packed() -> nf4.Packed:
    """Two matrices of 64 rows; compiling reads no numbers."""
    counts = {"codes": 128 * HIDDEN // 2, "absmax": 128 * HIDDEN // 64}
    bytes_ = {name: torch.zeros(count, dtype=torch.uint8) for name, count in counts.items()}
    floats = {name: torch.zeros(count) for name, count in (("scales", 32), ("offsets", 2), ("code", 16))}
    starts = {name: torch.zeros(2, dtype=torch.int64) for name in ("starts", "scale_starts")}
    return nf4.Packed(**bytes_, **floats, **starts, absmax_code=torch.zeros(256), shape=(128, HIDDEN))


def launch_all(dtype: torch.dtype, capability: int) -> None:
    """Each launcher once or, where kernels differ by an argument, once for each; float8 where that GPU has it."""

    def rows(columns: int, room: int = ROOM) -> torch.Tensor:
        return torch.zeros(4, columns + room, dtype=dtype)[:, :columns]

    x, weight, angles = rows(HIDDEN), torch.zeros(HIDDEN, dtype=dtype), torch.zeros(4, HEADS.size // 2)
    rms_norm.launch_forward(x, weight, 1e-6, rows(HIDDEN))
    for residual in (None, rows(HIDDEN)):
        rms_norm.launch_backward(rows(HIDDEN), x, weight, 1e-6, residual, rows(HIDDEN))
    swiglu.launch_forward(rows(2 * WIDTH), rows(WIDTH))
    swiglu.launch_backward(rows(WIDTH, 0), rows(2 * WIDTH))
    size = torch.zeros(HEADS.size, dtype=dtype)
    for norm in (None, rotary.HeadNorm(size, size, 1e-6)):
        q, k = rotary.launch_forward(rows(HEADS.width), angles, angles, HEADS, norm)
        rotary.launch_backward((q, k, k), rows(HEADS.width), angles, angles, HEADS, norm)
    for scale in (None, 256.0):
        cross_entropy.launch(rows(VOCABULARY, 0), torch.zeros(4, dtype=torch.int64), scale)
    for add in (False, True):
        dropout.launch(x, 0.1, torch.zeros(1, dtype=torch.int64), 1, rows(HIDDEN), add=add)
    matrix = torch.zeros(16, HIDDEN, dtype=dtype)
    nf4.launch(packed(), torch.zeros(128 + 16, HIDDEN, dtype=dtype)[:128], (matrix, torch.zeros_like(matrix)))
    source = torch.nn.Parameter(torch.zeros(16, HIDDEN))
    shadows.Shadows([shadows.Shadow(matrix, source, 2.0)])._launch()
    if capability >= 10 * float8.CAPABILITY[0] + float8.CAPABILITY[1] and dtype is torch.bfloat16:
        float8.launch(x)
        for transposed in (False, True):
            nf4_float8.launch(packed(), transposed)


if __name__ == "__main__":
    capability = int(sys.argv[1])
    made = compile_only(capability)
    for dtype in (torch.float16,) if capability < 80 else (torch.float16, torch.bfloat16):
        launch_all(dtype, capability)
    for kernel in made:
        assert f".target sm_{capability}" in kernel.asm["ptx"], kernel.name
        assert kernel.asm["cubin"], kernel.name
    print(f"{len(made)} kernels for compute capability {capability / 10:.1f}")
