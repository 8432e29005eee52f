"""The operations of a decoder layer, in sizes: what transformers, peft and bitsandbytes allocate, in their order.

Mirrors modeling_qwen3.py and its siblings (transformers 5.17), peft's LoRA layers (0.21) and bitsandbytes' MatMul4Bit
(0.50) under CUDA's autocast; the tests compare it with their tensors. T is the rows of a value (tokens of the
micro-batch, padding included), w its width. One recorded node stands for one node of torch's graph, and a `del` where
a temporary of theirs dies.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unsloth_factory.estimate.rehearsal import Buffer, Memory, Part, Tape, Value
from unsloth_factory.model.shapes import LinearShape, ModelShape

Weights = Literal["nf4", "half", "trained"]
"""How a layer's matrices are stored: 4 bit, 16 bit (both frozen), or float32 and trained."""
NF4_BLOCK = 64


@dataclass(frozen=True)
class Layout:
    """What trains, and in which format everything is."""

    shape: ModelShape
    layers: tuple[Weights, ...]
    """The matrices of each decoder layer."""
    ends_trained: bool = False
    """Embedding, final norm and head train too."""
    lora_rank: int = 0
    lora_targets: frozenset[str] = frozenset()
    lora_dropout: bool = False
    checkpointing: bool = True
    plain_attention: bool = False
    """No kernel takes grouped heads without a mask; torch multiplies whole matrices (compute capability 7.5)."""


@dataclass(frozen=True)
class Rows:
    """One micro-batch: documents packed into one row, or padded to one width."""

    count: int
    """Rows T of every value: tokens, padding included."""
    width: int
    """Longest row that attention sees: T when packed, the padded length otherwise."""
    masked: bool
    """Attention gets a dense mask."""
    trained: int
    """Positions with a target."""


@dataclass
class Lasting:
    """What outlives a micro-batch."""

    gradients: dict[str, Buffer] = field(default_factory=dict)
    """Of the trained parameters."""
    workspaces: dict[str, Buffer] = field(default_factory=dict)
    """cuBLAS's, by thread."""
    workspace: int = 32 * 2**20
    """Bytes of one of them: 32 MiB on Hopper, 8.1 MiB before."""


@dataclass
class Operations:
    """The operations of one rehearsed micro-batch."""

    tape: Tape
    layout: Layout
    rows: Rows
    lasting: Lasting
    adapter: bool = True
    casts: dict[str, Value] = field(default_factory=dict)
    """Autocast's 16-bit copies of float32 parameters, until its context is left."""
    recomputing: bool = False
    stopped: bool = False
    """A recomputed layer ends as soon as all is kept that its backward pass needs."""

    @property
    def memory(self) -> Memory:
        """Where everything is allocated."""
        return self.tape.memory

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return self.layout.shape

    def new(self, width: int, size: int, *reads: int, rows: int | None = None, part: Part = "temporaries") -> Value:
        """Result of an elementwise kernel; `reads` are the bytes that it reads in each row."""
        count = self.rows.count if rows is None else rows
        if self.stopped:
            return Value(Buffer(self.memory, 0, part), width, size)
        self.tape.spend(count * (width * size + sum(reads)))
        return Value(Buffer(self.memory, count * width * size, part), width, size)

    def product(self, inner: int, width: int, rows: int | None = None, part: Part = "temporaries") -> Value:
        """Result of a 16-bit matrix product, [T, inner] x [inner, width]."""
        count = self.rows.count if rows is None else rows
        if self.stopped:
            return Value(Buffer(self.memory, 0, part), width, 2)
        self._open_handle()
        self.tape.spend(2.0 * (count * (inner + width) + inner * width), dense=2.0 * count * inner * width)
        return Value(Buffer(self.memory, 2 * count * width, part), width, 2)

    def _open_handle(self) -> None:
        """The workspace that cuBLAS takes at a thread's first product; backward passes run in one of their own."""
        thread = "forward" if self.tape.phase in ("forward", "reference") else "backward"
        if thread not in self.lasting.workspaces:
            self.lasting.workspaces[thread] = Buffer(self.memory, self.lasting.workspace, "workspace")

    def weight_product(self, inner: int, width: int, rows: int | None = None) -> Value:
        """Gradient of a weight [width, inner], 16 bit."""
        count, weights = self.rows.count if rows is None else rows, inner * width
        self.tape.spend(2.0 * (count * (inner + width) + weights), dense=2.0 * count * weights)
        return Value(Buffer(self.memory, 2 * weights, "temporaries"), weights, 2)

    def plain(self, count: int, part: Part, moved: float = 0.0) -> Buffer:
        """Memory of `count` bytes that one kernel fills, reading `moved` bytes."""
        self.tape.spend(moved + count)
        return Buffer(self.memory, count, part)

    def stop(self) -> None:
        """Nothing after this point of a recomputed layer is needed."""
        self.stopped = self.recomputing

    # -- parameters ---------------------------------------------------------------------------------------------

    def half_weight(self, name: str, count: int) -> Value:
        """Autocast's 16-bit copy of a float32 parameter; made once in a context."""
        if name not in self.casts:
            copy = Value(self.plain(2 * count, "workspace", 4.0 * count), count, 2)

            def backward(gradient: Value) -> tuple[Value | None, ...]:
                self.accumulate(name, self.plain(4 * count, "temporaries", 2.0 * count))
                return ()

            self.casts[name] = self.tape.record(copy, (), backward, trains=True)
        return self.casts[name]

    def accumulate(self, name: str, gradient: Buffer) -> None:
        """Add to a parameter's gradient, which the first one becomes."""
        if name in self.lasting.gradients:
            self.tape.spend(3.0 * gradient.count)
        else:
            self.lasting.gradients[name] = gradient.become("gradients")

    # -- elementwise --------------------------------------------------------------------------------------------

    def cast(self, value: Value, size: int) -> Value:
        """The value in another number format; itself when it has that format."""
        before, width = value.size, value.width
        if before == size:
            return value

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, before, width * size),)

        return self.tape.record(self.new(width, size, width * before), (value,), backward)

    def add(self, first: Value, second: Value) -> Value:
        """Sum; its gradient is that of both."""
        width, size = first.width, max(first.size, second.size)
        out = self.new(width, size, width * (first.size + second.size))
        sizes = (first.size, second.size)

        def backward(gradient: Value) -> tuple[Value | None, ...]:
            return tuple(gradient if s == size else self.new(width, s, width * size) for s in sizes)

        return self.tape.record(out, (first, second), backward)

    def scale(self, value: Value) -> Value:
        """Product with a constant of any shape (a number, a cosine, a mask); keeps nothing of the value."""
        width, size = value.width, value.size

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, size, width * size),)

        return self.tape.record(self.new(width, size, width * size), (value,), backward)

    # -- norm ---------------------------------------------------------------------------------------------------

    def norm(self, value: Value, name: str, heads: int = 1, trained: bool = False) -> Value:
        """RMSNorm of `heads` pieces in each row; computed in float32."""
        size, width = value.size, value.width
        wide = self.cast(value, 4)
        del value
        factor = self._root_mean_square(wide, heads)
        normed = self._times_factor(wide, factor)
        del wide, factor
        narrow = self.cast(normed, size)
        out = self.new(width, 4 if trained else size, width * size)
        kept = narrow.kept() if trained and self.tape.recording else None
        count = width // heads

        def backward(gradient: Value) -> tuple[Value | None, ...]:
            inner = self.new(width, gradient.size, width * gradient.size)
            if kept is not None:
                self.new(width, gradient.size, width * (gradient.size + size))
                self.accumulate(name, self.plain(4 * count, "temporaries", 4.0 * width * self.rows.count))
            return (self.cast(inner, size),)

        return self.tape.record(out, (narrow,), backward, trains=trained)

    def _root_mean_square(self, wide: Value, heads: int) -> Value:
        width = wide.width
        self.new(width, 4, 4 * width)
        factor = self.new(heads, 4, 4 * width)
        kept = wide.kept() if self.tape.records(wide) else None

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept is not None
            self.tape.spend(0.0, kernels=5)
            mean = self.new(width, 4)
            power, scaled = self.new(width, 4, 4 * width), self.new(width, 4, 4 * width)
            result = self.new(width, 4, 8 * width)
            del mean, power, scaled
            return (result,)

        return self.tape.record(factor, (wide,), backward)

    def _times_factor(self, wide: Value, factor: Value) -> Value:
        width, heads = wide.width, factor.width
        out = self.new(width, 4, 4 * width)
        kept = (wide.kept(), factor.kept()) if self.tape.records(wide) else ()

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            through = self.new(width, 4, 8 * width)
            direct = self.new(width, 4, 4 * width)
            return direct, self.new(heads, 4, through.size * width)

        return self.tape.record(out, (wide, factor), backward)

    # -- linear layers ------------------------------------------------------------------------------------------

    def linear(self, value: Value, shape: LinearShape, name: str, weights: Weights, last: bool = False) -> Value:
        """A linear layer as it is stored, with its LoRA matrices; `last`: nothing after it in its layer keeps anything.

        A frozen layer keeps no input.
        """
        lora = self.adapter and shape.name in self.layout.lora_targets
        if weights == "trained":
            return self._trained_linear(value, shape, name, last)
        if last and not lora:
            self.stop()
        base = self._nf4_linear(value, shape) if weights == "nf4" else self._half_linear(value, shape)
        if not lora:
            return base
        if weights == "nf4":
            base = self._copy(base)
            source = value
        else:
            source = self.cast(value, 4)  # peft brings the input to the LoRA weights' format, autocast back
        if self.layout.lora_dropout:
            source = self._dropout(source)
        inner = self._lora_product(self.cast(source, 2), name + ".A", shape.in_features, self.layout.lora_rank)
        if last:
            inner.kept()
            self.stop()
        outer = self._lora_product(inner, name + ".B", self.layout.lora_rank, shape.out_features)
        del inner
        outer = self.scale(outer)
        return self.add(base, outer)

    def _trained_linear(self, value: Value, shape: LinearShape, name: str, last: bool) -> Value:
        weight = self.half_weight(name, shape.weights)
        narrow = self.cast(value, 2)
        kept = self._kept_for_product(narrow, weight)
        if last:
            self.stop()
        out = self.product(shape.in_features, shape.out_features)
        inner, outer, has_input = shape.in_features, shape.out_features, narrow.node is not None

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            if shape.bias:
                self.accumulate(name + ".bias", self.plain(4 * outer, "temporaries"))
            gradient = self.weight_product(inner, outer)
            return (self.product(outer, inner) if has_input else None), gradient

        return self.tape.record(out, (narrow, weight), backward)

    def _kept_for_product(self, value: Value, weight: Value) -> tuple[Buffer, ...]:
        """What a product with a trained weight keeps: its input, and the weight where the input needs a gradient."""
        if not self.tape.recording:
            return ()
        return (value.kept(), weight.buffer) if value.node is not None else (value.kept(),)

    def _half_linear(self, value: Value, shape: LinearShape) -> Value:
        inner, outer = shape.in_features, shape.out_features

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.product(outer, inner),)

        return self.tape.record(self.product(inner, outer), (value,), backward)

    def _nf4_linear(self, value: Value, shape: LinearShape) -> Value:
        inner, outer = shape.in_features, shape.out_features
        weights, blocks = shape.weights, 4 * -(-shape.weights // NF4_BLOCK)

        def unpacked() -> Buffer:
            return self.plain(2 * weights, "workspace", 0.5 * weights + blocks)

        def backward(_: Value) -> tuple[Value | None, ...]:
            scales = self.plain(blocks, "workspace")
            weight = unpacked()
            del scales
            result = self.product(outer, inner)
            del weight
            return (result,)

        scales = self.plain(blocks, "workspace"), self.plain(blocks, "workspace", blocks)
        weight = unpacked()
        out = self.product(inner, outer)
        del weight, scales
        return self.tape.record(out, (value,), backward)

    def _copy(self, value: Value) -> Value:
        """The clone that peft makes of a 4-bit layer's result; its backward pass does nothing."""
        out = self.new(value.width, value.size, value.width * value.size)
        return self.tape.record(out, (value,), lambda gradient: (gradient,))

    def _dropout(self, value: Value) -> Value:
        width, size = value.width, value.size
        out = self.new(width, size, width * size)
        mask = self.new(width, 1)
        kept = mask.kept()
        del mask

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept is not None
            return (self.new(width, size, width * (size + 1)),)

        return self.tape.record(out, (value,), backward)

    def _lora_product(self, value: Value, name: str, inner: int, outer: int) -> Value:
        """One of the two LoRA matrices; its weight trains, so that it keeps its input."""
        weight = self.half_weight(name, inner * outer)
        has_input = value.node is not None
        kept = self._kept_for_product(value, weight)
        out = self.product(inner, outer)

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            gradient = self.weight_product(inner, outer)
            return (self.product(outer, inner) if has_input else None), gradient

        return self.tape.record(out, (value, weight), backward)
