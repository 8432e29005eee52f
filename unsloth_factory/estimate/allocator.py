"""A model of torch's caching allocator: what is reserved for a given order of allocations and releases.

Rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11, one stream, default settings): sizes are rounded up to 512
bytes; up to 1 MiB comes from segments of 2 MiB, up to 10 MiB from segments of 20 MiB, more from segments of its own,
rounded up to 2 MiB. The smallest free block that is large enough is taken and split; neighbours that are free are
joined. Segments are not given back, so that `reserved` only grows.
"""

from __future__ import annotations

from bisect import bisect_left, insort

KIB, MIB = 2**10, 2**20
ROUND = 512
SMALL = MIB
SMALL_SEGMENT = 2 * MIB
MEDIUM = 10 * MIB
MEDIUM_SEGMENT = 20 * MIB


class Block:
    """A stretch of a segment; neighbours in the same segment are linked."""

    __slots__ = ("address", "after", "before", "free", "size", "small")

    def __init__(self, address: int, size: int, small: bool) -> None:
        self.address = address
        self.size = size
        self.small = small
        self.free = True
        self.before: Block | None = None
        self.after: Block | None = None


class CachingAllocator:
    """Bytes in use and bytes reserved, as torch.cuda.memory_allocated and memory_reserved would tell them."""

    def __init__(self) -> None:
        self.allocated = 0
        self.reserved = 0
        # Free blocks by (size, address), as the allocator's ordered sets.
        self._free: dict[bool, list[tuple[int, int, Block]]] = {True: [], False: []}
        self._next_address = 0

    def take(self, size: int) -> Block:
        """A block of at least `size` bytes."""
        size = max(ROUND, -(-size // ROUND) * ROUND)
        small = size <= SMALL
        free = self._free[small]
        place = bisect_left(free, (size, -1))
        block = free.pop(place)[2] if place < len(free) else self._segment(size, small)
        rest = block.size - size
        if rest >= ROUND if small else rest > SMALL:
            self._split(block, size)
        block.free = False
        self.allocated += block.size
        return block

    def release(self, block: Block) -> None:
        """Give a block back; it joins free neighbours."""
        self.allocated -= block.size
        block.free = True
        for other in (block.before, block.after):
            if other is not None and other.free:
                block = self._join(block, other)
        insort(self._free[block.small], (block.size, block.address, block))

    def _segment(self, size: int, small: bool) -> Block:
        if small:
            length = SMALL_SEGMENT
        elif size < MEDIUM:
            length = MEDIUM_SEGMENT
        else:
            length = -(-size // SMALL_SEGMENT) * SMALL_SEGMENT
        self.reserved += length
        block = Block(self._next_address, length, small)
        self._next_address += length + 1  # segments never join
        return block

    def _split(self, block: Block, size: int) -> None:
        rest = Block(block.address + size, block.size - size, block.small)
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after, block.size = rest, size
        insort(self._free[rest.small], (rest.size, rest.address, rest))

    def _join(self, block: Block, other: Block) -> Block:
        """One block of two neighbours; `other` is free and leaves the list."""
        free = self._free[other.small]
        free.pop(bisect_left(free, (other.size, other.address)))
        first, second = (other, block) if other.address < block.address else (block, other)
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            second.after.before = first
        first.free = True
        return first
