"""Layer inputs that wait for the backward pass in the CPU's memory.

With every layer recomputed they are all that grows with the number of layers: 8 KB a token and layer of Qwen3-8B.

The copies hide behind the arithmetic, in a stream of their own. A layer of Qwen3-8B takes 386 MFLOP a token forwards
and its input is 8 KB: at 100 TFLOP/s 3.9 us of work for a copy of 0.33 us at 25 GB/s. An input leaves while its layer
computes; the one of the layer below comes back while a layer computes its gradient, so two inputs lie on the GPU at
once. Three orders make that right:

1. A copy out waits for what has been given to the computing stream before it, which makes the input; that stream waits
   for the copy before the input's memory is given back (`wait`), so nothing is written over it.
2. A copy back goes to fresh memory of the computing stream, whose earlier users were given to that stream before: it
   waits for them, and that stream waits for the copy before it reads, or writes there once the memory is given back.
3. All copies are in one stream, so the next micro-batch writes after this one has read.

No `record_stream`: with it memory is free only when the copy is done, and Python, far ahead of the GPU, would take new
memory for each layer meanwhile.

On a CPU the same happens without streams. `tests/model/test_fast_streams.py` checks the orders on a model of streams.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

BLOCK = 64 * 2**20
"""Bytes that are pinned at once; torch rounds pinned memory up to a power of two, and would take 512 MB for 330."""


@dataclass
class Away:
    """A layer's input that is somewhere else."""

    start: int
    """Byte at which it begins."""
    shape: torch.Size
    dtype: torch.dtype
    micro_batch: int
    """Number of the micro-batch that it belongs to."""
    copied: Any = None
    """CUDA event behind its last copy; None on a CPU."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.shape.numel() * self.dtype.itemsize


class HostInputs:
    """Room for the layer inputs of one micro-batch; it grows with the longest and is used again by the next.

    Args:
        device: Where the inputs are needed.
        block: Bytes of the pieces in which the room grows.
    """

    def __init__(self, device: torch.device, block: int = BLOCK) -> None:
        self.device = device
        self._block = block
        self._blocks: list[torch.Tensor] = []
        self._used = 0
        self._stream: Any = None
        self._micro_batch = 0

    @property
    def size(self) -> int:
        """Bytes of the CPU's memory that are held."""
        return self._block * len(self._blocks)

    def begin(self) -> None:
        """A new micro-batch: the places of the last one are free. Its own backward pass can no longer come."""
        self._used = 0
        self._micro_batch += 1

    def send(self, x: torch.Tensor) -> Away:
        """Begin to copy x, contiguous, to the CPU's memory. Keep x and leave it as it is until after `wait`."""
        assert x.is_contiguous()
        away = Away(self._used, x.shape, x.dtype, self._micro_batch)
        self._used += away.size
        while self._used > self.size:
            self._blocks.append(self._new_block())
        with self._beside():
            for there, here in self._pieces(away, x):
                there.copy_(here, non_blocking=True)
        self._mark(away)
        return away

    def fetch(self, away: Away) -> torch.Tensor:
        """Begin to copy an input back; read it only after `wait`."""
        assert away.micro_batch == self._micro_batch, "a later forward pass has taken this one's memory"
        x = torch.empty(away.shape, dtype=away.dtype, device=self.device)
        with self._beside():
            for there, here in self._pieces(away, x):
                here.copy_(there, non_blocking=True)
        self._mark(away)
        return x

    def wait(self, away: Away) -> None:
        """What is computed from now on comes after this input's last copy."""
        if away.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(away.copied)

    def join(self) -> None:
        """What is computed from now on comes after all copies: memory that one of them writes to may be given back."""
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def release(self) -> None:
        """Give the CPU's memory back; it is taken anew when it is needed."""
        if not self._blocks:
            return
        self.begin()
        if self._stream is not None:
            self._stream.synchronize()
        self._blocks.clear()
        if self.device.type == "cuda":
            torch._C._host_emptyCache()  # torch keeps pinned memory otherwise

    def _beside(self) -> AbstractContextManager[Any]:
        """Within it work goes to the stream of the copies, after all that the computing stream was given so far."""
        if self.device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _mark(self, away: Away) -> None:
        if self._stream is not None:
            away.copied = self._stream.record_event()

    def _pieces(self, away: Away, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(bytes in the CPU's memory, bytes of x) of each block that the input lies in."""
        flat = x.view(-1).view(torch.uint8)
        done = 0
        while done < away.size:
            block, offset = divmod(away.start + done, self._block)
            count = min(self._block - offset, away.size - done)
            yield self._blocks[block][offset : offset + count], flat[done : done + count]
            done += count

    def _new_block(self) -> torch.Tensor:
        """Pinned, if it is given: then it is copied at full speed, and Python does not wait."""
        if self.device.type == "cuda":
            try:
                return torch.empty(self._block, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:  # the limit of locked memory, or no room for it
                pass
        return torch.empty(self._block, dtype=torch.uint8)
