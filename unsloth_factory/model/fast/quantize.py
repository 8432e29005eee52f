"""NF4 weights of the fast engine: quantised by bitsandbytes, one matrix at a time, then stacked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from unsloth_factory.kernels.nf4 import BLOCK_SIZE, Packed


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """(packed codes, bitsandbytes' state) of one matrix [N, K], exactly as the standard engine quantises it."""
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(
        weight.contiguous(), blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4", quant_storage=torch.uint8
    )


def stack(parts: Sequence[tuple[torch.Tensor, Any]]) -> Packed:
    """One packed weight of matrices with the same number of columns; values and memory stay what they were."""
    states = [state for _, state in parts]
    device = parts[0][0].device
    rows, columns = sum(state.shape[0] for state in states), states[0].shape[1]
    assert all(state.shape[1] == columns and state.nested for state in states), "parts of one width, doubly quantised"
    assert columns % BLOCK_SIZE == 0, "a block of maxima would run into the next row"

    def starts(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(sizes)][:-1], dtype=torch.int64, device=device)

    return Packed(
        codes=torch.cat([codes.flatten() for codes, _ in parts]),
        absmax=torch.cat([state.absmax for state in states]),
        scales=torch.cat([state.state2.absmax for state in states]),
        offsets=torch.stack([state.offset.float().reshape(()) for state in states]),
        starts=starts([len(state.absmax) for state in states]),
        scale_starts=starts([len(state.state2.absmax) for state in states]),
        code=states[0].code,
        absmax_code=states[0].state2.code,
        shape=(rows, columns),
    )
