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

    One sum answers it in most cases: NaN and infinity survive every addition (infinity minus infinity is NaN). A sum
    that is not finite may still be an overflow of sound values, so then each value is looked at. On one CPU core the
    sum is several times faster than `isfinite().all()`, because it makes no second tensor.
    """
    total = torch.sum(tensor, dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


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
