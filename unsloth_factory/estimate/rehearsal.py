"""Memory, tape and cost counter of a rehearsal: tensors with a size and a place in memory, but without contents.

A buffer lives exactly as long as Python refers to it, as a torch tensor's memory does; that is why the code in
`layers` and `decoder` reads like the code it stands for. What an operation keeps for its backward pass is referred to
by a closure, which the tape drops once it has run.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Literal, get_args

from unsloth_factory.estimate.allocator import Block, CachingAllocator

Part = Literal[
    "base weights",
    "quantisation state",
    "trained weights",
    "gradients",
    "optimizer state",
    "activations",
    "temporaries",
    "logits",
    "workspace",
]
PARTS: tuple[Part, ...] = get_args(Part)


class Memory:
    """The allocator, what is in use by part, and the picture of the fullest moment."""

    def __init__(self) -> None:
        self.allocator = CachingAllocator()
        self.parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        self.peak = 0
        self.peak_parts: dict[Part, int] = dict(self.parts)

    def forget_peak(self) -> None:
        """Let the fullest moment count from now on."""
        self.peak, self.peak_parts = self.allocator.allocated, dict(self.parts)

    def take(self, count: int, part: Part) -> Block:
        """Allocate `count` bytes for a part."""
        block = self.allocator.take(count)
        self.parts[part] += block.size
        if self.allocator.allocated > self.peak:
            self.peak = self.allocator.allocated
            self.peak_parts = dict(self.parts)
        return block

    def release(self, block: Block, part: Part) -> None:
        """Free a block."""
        self.parts[part] -= block.size
        self.allocator.release(block)


class Buffer:
    """Memory of one tensor; given back when nothing refers to it any more."""

    __slots__ = ("block", "count", "memory", "part")

    def __init__(self, memory: Memory, count: int, part: Part) -> None:
        self.memory = memory
        self.count = count
        self.part = part
        self.block = memory.take(count, part)

    def __del__(self) -> None:
        self.memory.release(self.block, self.part)

    def become(self, part: Part) -> Buffer:
        """Count it under another part from now on."""
        self.memory.parts[self.part] -= self.block.size
        self.memory.parts[part] += self.block.size
        self.part = part
        return self


class Value:
    """A tensor without contents: `width` entries of `size` bytes in each row."""

    __slots__ = ("buffer", "node", "size", "width")

    def __init__(self, buffer: Buffer, width: int, size: int) -> None:
        self.buffer = buffer
        self.width = width
        self.size = size
        self.node: Node | None = None

    def kept(self) -> Buffer:
        """Its memory, counted from now on as kept for the backward pass."""
        return self.buffer.become("activations") if self.buffer.part == "temporaries" else self.buffer


Backward = Callable[[Value], "tuple[Value | None, ...]"]


@dataclass
class Node:
    """One recorded operation."""

    number: int
    parents: list[Node | None]
    backward: Backward | None
    """Takes the gradient of the result and gives one for each parent. None: a leaf, which keeps its gradient."""
    again: Callable[[], tuple[Node, Node]] | None = None
    """A checkpointed stretch: runs it again, and gives the node of its result and that of its input."""
    gradient: Value | None = None


@dataclass
class Work:
    """What the operations of one phase cost."""

    kernels: int = 0
    moved: float = 0.0
    """Bytes through the card's memory."""
    dense: float = 0.0
    """Floating point operations of matrix products."""
    attention: float = 0.0
    """Those of attention kernels."""

    def plus(self, other: Work, times: int) -> Work:
        """This, and `times` what the other has beyond it."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        return Work(*(mine + times * (theirs - mine) for mine, theirs in pairs))


@dataclass
class Tape:
    """Records operations and walks them backwards, newest first, as torch's engine does."""

    memory: Memory
    recording: bool = True
    phase: str = "forward"
    work: dict[str, Work] = field(default_factory=dict)
    _count: int = 0

    def spend(self, moved: float, dense: float = 0.0, attention: float = 0.0, kernels: int = 1) -> None:
        """Count the cost of an operation under the present phase."""
        work = self.work.setdefault(self.phase, Work())
        work.kernels += kernels
        work.moved += moved
        work.dense += dense
        work.attention += attention

    def records(self, *parents: Value) -> bool:
        """Whether an operation on these values keeps what its backward pass needs."""
        return self.recording and any(parent.node is not None for parent in parents)

    def record(self, out: Value, parents: tuple[Value, ...], backward: Backward, trains: bool = False) -> Value:
        """Let `out` depend on its parents; an operation that `trains` a parameter is recorded in any case."""
        if self.recording and (trains or self.records(*parents)):
            out.node = self.node([parent.node for parent in parents], backward)
        return out

    def node(self, parents: list[Node | None], backward: Backward | None) -> Node:
        """A new node, newer than all others."""
        self._count += 1
        return Node(self._count, parents, backward)

    def run_backward(self, root: Node, gradient: Value) -> None:
        """Run every operation that `root` depends on; each frees what it kept."""
        root.gradient = gradient
        del gradient
        waiting = [(-root.number, root)]
        seen = {root.number}
        while waiting:
            node = heapq.heappop(waiting)[1]
            if node.again is not None:
                self._expand(node)
            ready = node.parents if node.backward is None else self._run(node)
            for parent in ready:
                if parent is not None and parent.number not in seen:
                    seen.add(parent.number)
                    heapq.heappush(waiting, (-parent.number, parent))
            del node, ready
            parent = None

    def _expand(self, node: Node) -> None:
        """Put the nodes of a checkpointed stretch, which is run again for that, in the place of its one node."""
        assert node.again is not None
        again, node.again = node.again, None
        result, start = again()
        start.parents, start.backward = node.parents, lambda gradient: (gradient,)
        result.gradient, node.gradient = node.gradient, None
        node.parents = [result]

    def _run(self, node: Node) -> list[Node | None]:
        """Run one operation's backward pass; the nodes that got a gradient."""
        backward, gradient, parents = node.backward, node.gradient, node.parents
        node.backward, node.gradient, node.parents = None, None, []
        assert backward is not None
        assert gradient is not None
        results = backward(gradient)
        del backward, gradient
        ready: list[Node | None] = []
        for parent, result in zip(parents, results, strict=True):
            if parent is not None and result is not None:
                self._add(parent, result)
                ready.append(parent)
        return ready

    def _add(self, node: Node, gradient: Value) -> None:
        """The first gradient is taken over; a further one is added into it in place."""
        if node.gradient is None:
            node.gradient = gradient
        else:
            self.spend(3.0 * gradient.buffer.count)
