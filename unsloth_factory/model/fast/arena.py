"""Room for the activations that a micro-batch keeps: one block, filled from the front, given back all at once.

torch's allocator would do it too, but rows of other lengths leave gaps in what it holds: with graphs of 16 sizes in one
pool, 14.5 GiB were full of what 12.4 had been planned for.
"""

from __future__ import annotations

import torch

ALIGNED = 64
"""Numbers: 128 bytes of 16-bit ones, a line of the GPU's cache."""


class Arena:
    """One block of memory.

    Args:
        size: Bytes.
        dtype: Of all tensors in it.
        device: Where it lies.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._block = torch.empty(size // dtype.itemsize, dtype=dtype, device=device)
        self.used = 0
        """Numbers that are taken."""
        self.outside = 0
        """Numbers that found no room so far: what the size was too small by."""

    def rewind(self, used: int = 0) -> None:
        """Give back what lies behind the first `used` numbers: all of it when a new micro-batch begins."""
        self.used = used

    def take(self, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns], not initialised; ordinary memory where the block is full."""
        start, stop = self.used, self.used + rows * columns
        if stop > len(self._block):
            self.outside += rows * columns
            return torch.empty(rows, columns, dtype=self._block.dtype, device=self._block.device)
        self.used = -(-stop // ALIGNED) * ALIGNED
        return self._block[start:stop].view(rows, columns)
