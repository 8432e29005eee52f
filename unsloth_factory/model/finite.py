"""Refuse weights that hold NaN or infinity before anything is trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.weight_files import read_header

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite.

    Smallest and largest value tell it: NaN wins both comparisons. In bfloat16 one CPU core reads 5.5 GB/s so, against
    0.4 GB/s with `isfinite().all()`: 3 s for Qwen3-8B instead of 40.
    """
    if tensor.numel() == 0:
        return True
    smallest, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(smallest)) and bool(torch.isfinite(largest))


def refuse_nonfinite(paths: Iterable[Path]) -> None:
    """Read every floating-point tensor of the files once, one tensor in memory at a time.

    The stored values are checked, not the loaded ones: NF4 quantisation maps a NaN to some ordinary number.

    Raises:
        UserError: Names the file and the first bad tensor.
    """
    from safetensors import safe_open

    for path in paths:
        names = [entry.name for entry in read_header(path) if entry.dtype in FLOAT_DTYPES]
        with safe_open(path, framework="pt", device="cpu") as file:
            for name in names:
                if not is_finite(file.get_tensor(name)):
                    raise UserError(
                        f"{path}: {name} holds NaN or infinity. The file is damaged, or its training diverged."
                    )
