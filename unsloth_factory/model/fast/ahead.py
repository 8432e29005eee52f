"""The next 16-bit matrix is made from NF4 on a second stream while the product with the present one runs.

Making a matrix is bound by memory, a product by arithmetic, so beside each other they may cost less than in turn. There
are two places for matrices, at fixed addresses: the allocator need not know of the second stream, and CUDA graphs may
hold them. The matrices of one pass take the places in turn. When product i asks for its matrix, this is issued:

    main stream                                  side stream
    1. wait for all of the side stream
                                                 2. wait for the main stream as it is now
                                                 3. write matrix i + 1 into the place of matrix i - 1
    4. product i

Written before read: product i comes after (1), and the last thing on the side stream then was the writing of matrix i.
Read before overwritten: (3) comes after (2), and the last thing on the main stream that read the place of matrix i - 1,
product i - 1 or anything before this pass, had been issued by then. At the same time run only (3) and (4), in different
places, and LoRA's 16-bit copies that (3) reads do not change within a pass. The side stream begins from the main one
and is waited for at the end of each pass, as the capture of a graph demands.

What comes next is not computed but remembered: what each stage of a pass (a layer, forwards or backwards, with what it
keeps) asks for is written down each time. A pass all of whose stages are known looks ahead; when it is asked for
anything else, the rest of it makes each matrix when it is asked for. On a CPU there is one stream: the same order, in
turn.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch

from unsloth_factory.kernels import nf4


@dataclass(frozen=True, eq=False)
class Unpacked:
    """A 16-bit matrix that products ask for: W [N, K] from NF4, alone or with a LoRA matrix at its side."""

    packed: nf4.Packed
    dtype: torch.dtype
    beside: torch.Tensor | None = None
    """[N, R] behind W's rows"""
    below: torch.Tensor | None = None
    """[R, K] under W"""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns, the LoRA matrix included."""
        rows, columns = self.packed.shape
        more_rows = 0 if self.below is None else len(self.below)
        return rows + more_rows, columns + (0 if self.beside is None else self.beside.shape[1])

    @property
    def numbers(self) -> int:
        """Its size."""
        return self.shape[0] * self.shape[1]

    def make(self, place: torch.Tensor | None = None) -> torch.Tensor:
        """The matrix, in memory of its own or at the front of a flat place."""
        rows, columns = self.packed.shape
        if place is None:
            place = torch.empty(self.numbers, dtype=self.dtype, device=self.packed.codes.device)
        matrix = place[: self.numbers].view(self.shape)
        extra = None
        if self.beside is not None:
            extra = (self.beside, matrix[:, columns:])
        elif self.below is not None:
            extra = (self.below, matrix[rows:])
        nf4.dequantize(self.packed, self.dtype, matrix[:rows, :columns], extra)
        return matrix


class Side:
    """A second stream beside the current one; on a CPU everything runs in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def fork(self) -> None:
        """The side stream waits for all that the current one was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def running(self) -> AbstractContextManager[object]:
        """What is issued within runs on the side stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def join(self) -> None:
        """The current stream waits for all that the side one was given."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)


class Ahead:
    """Makes the matrices of one decoder.

    Args:
        numbers: Of the largest matrix.
        dtype: Of all.
        side: The second stream.
        device: Where they are.
    """

    def __init__(self, numbers: int, dtype: torch.dtype, side: Side, device: torch.device) -> None:
        self._places = [torch.empty(numbers, dtype=dtype, device=device) for _ in range(2)]
        self._side = side
        self._known: dict[Hashable, list[Unpacked]] = {}
        self._asked: list[list[Unpacked]] = []
        self._chain: list[Unpacked] = []
        self._at = 0
        self._next: torch.Tensor | None = None
        self.prepared = 0
        """Matrices that were there when they were asked for, so far."""
        self.surprises = 0
        """Passes that asked for another matrix than the one expected, so far."""

    @contextmanager
    def along(self, stages: Sequence[Hashable]) -> Iterator[None]:
        """A pass through these stages; `enter` begins each of them."""
        known = all(stage in self._known for stage in stages)
        self._chain = [matrix for stage in stages for matrix in self._known[stage]] if known else []
        self._at, self._asked = 0, []
        try:
            yield
            self._known.update(zip(stages, self._asked, strict=True))
        finally:
            self._settle()
            self._chain, self._asked = [], []

    def enter(self) -> None:
        """The pass comes to its next stage."""
        self._asked.append([])

    def take(self, wanted: Unpacked) -> torch.Tensor:
        """A matrix; it holds until the next is taken."""
        if self._asked:
            self._asked[-1].append(wanted)
        ready = self._settle()
        expected = self._chain[self._at] if self._at < len(self._chain) else None
        if expected is not wanted:
            self.surprises += bool(self._chain)
            self._chain = []
            return wanted.make(self._places[0])
        self.prepared += ready is not None
        matrix = wanted.make(self._places[self._at % 2]) if ready is None else ready
        self._at += 1
        if self._at < len(self._chain):
            self._side.fork()
            with self._side.running():
                self._next = self._chain[self._at].make(self._places[self._at % 2])
        return matrix

    def _settle(self) -> torch.Tensor | None:
        """What was prepared; from here on the current stream may read and write all places."""
        ready, self._next = self._next, None
        if ready is not None:
            self._side.join()
        return ready
