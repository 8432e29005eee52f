"""One forward and backward pass of a causal language model, in sizes: attention, layers, checkpointing and the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from unsloth_factory.estimate.layers import Operations, Weights
from unsloth_factory.estimate.rehearsal import Buffer, Node, Value

# float32 logits of one chunk; the same number as log_probs.LOGIT_BYTES, which a test compares (torch stays out here).
LOGIT_BYTES = 256 * 2**20
# Matrix products in float32 instead of 16 bit: about 5 TFLOP/s on a T4 instead of 24.
PLAIN_COST = 5.0
Maker = Callable[[Value], Value]


@dataclass
class Decoder(Operations):
    """A rehearsed model; `run` is one micro-batch with its gradients."""

    head_gradient: list[Buffer] = field(default_factory=list)
    shared: list[Buffer | None] = field(default_factory=list)
    """What lives to the end: rotary cosines and sines, the mask, inputs that nobody needs."""

    def run(self, reference_first: bool = False) -> None:
        """Forward, loss and backward pass; before it the reference policy's forward pass (DPO)."""
        if reference_first:
            self._phase("reference")
            self.adapter = self.tape.recording = False
            self._log_probs()
            self.adapter = self.tape.recording = True
        self._phase("forward")
        loss = self._log_probs()
        self.casts.clear()
        self._phase("backward")
        node, count = loss.node, loss.width
        del loss
        assert node is not None, "nothing trains"
        self.tape.run_backward(node, Value(Buffer(self.memory, 4 * count, "temporaries"), count, 4))

    def accumulate(self, name: str, gradient: Buffer) -> None:
        """A matrix that is embedding and head waits for both gradients before they reach the parameter's."""
        if name == "tied head":
            self.head_gradient.append(gradient)
        else:
            super().accumulate(name, gradient)

    def _phase(self, name: str) -> None:
        self.tape.phase = name

    # -- attention ----------------------------------------------------------------------------------------------

    def _rotate(self, value: Value) -> Value:
        """Rotary embedding of queries or keys: x * cos + rotate_half(x) * sin."""
        size = max(value.size, self.cosine_size)
        straight = self._widened_scale(value, size)
        turned = self._turn(value)
        del value
        bent = self._widened_scale(turned, size)
        del turned
        return self.add(straight, bent)

    def _widened_scale(self, value: Value, size: int) -> Value:
        """Product with a cosine or sine that may be wider than the value."""
        if value.size == size:
            return self.scale(value)
        width, before = value.width, value.size

        def backward(_: Value) -> tuple[Value | None, ...]:
            wide = self.new(width, size, width * size)
            return (self.cast(wide, before),)

        return self.tape.record(self.new(width, size, width * before), (value,), backward)

    def _turn(self, value: Value) -> Value:
        """rotate_half: one half negated, both joined."""
        width, size = value.width, value.size
        negated = self.new(width // 2, size, width * size // 2)
        out = self.new(width, size, width * size)
        del negated

        def backward(_: Value) -> tuple[Value | None, ...]:
            negated = self.new(width // 2, size, width * size // 2)
            first = self.new(width, size, width * size // 2)
            del negated
            self.new(width, size, width * size // 2)
            return (first,)

        return self.tape.record(out, (value,), backward)

    def _repeat(self, value: Value) -> Value:
        """Keys or values, once for every query head of their group."""
        before, width, size = value.width, self.shape.query_width, value.size
        if before == width:
            return value

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(before, size, width * size),)

        return self.tape.record(self.new(width, size, before * size), (value,), backward)

    def _contiguous(self, value: Value) -> Value:
        """The value as it is; its gradient has another layout and is copied."""
        width, size = value.width, value.size
        out = Value(value.buffer, width, size)

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, size, width * size),)

        return self.tape.record(out, (value,), backward)

    def _attend(self, query: Value, key: Value, value: Value) -> Value:
        """Attention of 16-bit queries, keys and values."""
        masked, heads, width = self.rows.masked, self.shape.heads, query.width
        plain = self.layout.plain_attention and not masked and self.shape.heads != self.shape.kv_heads
        pairs = self.rows.count * self.rows.width
        operations = 4.0 * pairs * width * (PLAIN_COST if plain else 1.0 if masked else 0.5)
        out = self.new(width, 2, 2 * (width + key.width + value.width))
        self.tape.spend(0.0, attention=operations, kernels=0)
        extra = self._plain_attention(pairs) if plain else self._kernel_extras(pairs)
        parents = (query, key, value)
        kept = [part.kept() for part in (*parents, out)] if self.tape.records(*parents) else []
        if kept:
            kept += [self.new(heads, 4).kept(), *(buffer.become("activations") for buffer in extra)]
        del extra
        widths = (query.width, key.width, value.width)

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            self.tape.spend(0.0, attention=2.5 * operations, kernels=2)
            results = tuple(self.new(w, 2, 2 * width) for w in widths)
            if plain:
                scores = [self.plain(4 * pairs * heads, "temporaries", 8.0 * pairs * heads) for _ in range(2)]
                del scores
            else:
                self._attention_workspace(widths)
            return results

        return self.tape.record(out, parents, backward)

    def _kernel_extras(self, pairs: int) -> list[Buffer]:
        """The mask as the kernel wants it: 16-bit numbers to add."""
        if not self.rows.masked:
            return []
        return [self.plain(2 * self.rows.count * (-(-self.rows.width // 16) * 16), "temporaries", pairs)]

    def _plain_attention(self, pairs: int) -> list[Buffer]:
        """Attention without a kernel, of 16-bit inputs: float32 copies, scores and softmax, [heads, T, T]."""
        copies = [self.new(self.shape.query_width, 4).buffer for _ in range(3)]
        scores = self.plain(4 * pairs * self.shape.heads, "temporaries")
        softmax = self.plain(4 * pairs * self.shape.heads, "temporaries", 4.0 * pairs * self.shape.heads)
        del scores
        return [*copies, softmax]

    def _attention_workspace(self, widths: tuple[int, ...]) -> None:
        """What the backward kernel takes for itself: queries' gradients in float32, keys' and values' for all heads."""
        query, rows = self.shape.query_width, self.rows.count
        expanded = 4 * query if widths[1] != query else 0
        self.plain(rows * (4 * query + expanded + 4 * self.shape.heads), "workspace")

    def attention(self, value: Value, name: str, weights: Weights) -> Value:
        """Projections, head norms, rotary embedding, attention, output projection."""
        shape, trained = self.shape, weights == "trained"
        linears = {linear.name: linear for linear in shape.linears()}

        def project(which: str) -> Value:
            return self.linear(value, linears[which], f"{name}.{which}", weights)

        query, key = self._contiguous(project("q_proj")), None
        if shape.head_norms:
            query = self.norm(query, name + ".q_norm", shape.heads, trained)
        key = self._contiguous(project("k_proj"))
        if shape.head_norms:
            key = self.norm(key, name + ".k_norm", shape.kv_heads, trained)
        worth = project("v_proj")
        worth = self._contiguous(worth) if self.rows.masked else worth
        turned = self._rotate(query), self._rotate(key)
        query, key = turned
        del turned
        repeats = self.rows.masked
        keys, worths = (self._repeat(key), self._repeat(worth)) if repeats else (key, worth)
        out = self._attend(self.cast(query, 2), self.cast(keys, 2), self.cast(worths, 2))
        del keys, worths
        return self.linear(out, linears["o_proj"], name + ".o_proj", weights)

    # -- layers -------------------------------------------------------------------------------------------------

    def mlp(self, value: Value, name: str, weights: Weights) -> Value:
        """down(silu(gate(x)) * up(x))."""
        linears = {linear.name: linear for linear in self.shape.linears()}
        gate = self._silu(self.linear(value, linears["gate_proj"], name + ".gate_proj", weights))
        up = self.linear(value, linears["up_proj"], name + ".up_proj", weights)
        product = self._multiply(gate, up)
        del gate, up, value
        return self.linear(product, linears["down_proj"], name + ".down_proj", weights, last=True)

    def _silu(self, value: Value) -> Value:
        width = value.width
        kept = value.kept() if self.tape.records(value) else None

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept is not None
            return (self.new(width, 2, 4 * width),)

        return self.tape.record(self.new(width, 2, 2 * width), (value,), backward)

    def _multiply(self, first: Value, second: Value) -> Value:
        width = first.width
        kept = (first.kept(), second.kept()) if self.tape.records(first, second) else ()

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            return self.new(width, 2, 4 * width), self.new(width, 2, 4 * width)

        return self.tape.record(self.new(width, 2, 4 * width), (first, second), backward)

    def layer(self, value: Value, index: int) -> Value:
        """One decoder layer."""
        weights = self.layout.layers[index]
        name, trained = f"layers.{index}", weights == "trained"
        inner = self.norm(value, name + ".input_norm", trained=trained)
        inner = self.attention(inner, name, weights)
        value = self.add(value, inner)
        del inner
        inner = self.norm(value, name + ".post_norm", trained=trained)
        inner = self.mlp(inner, name, weights)
        out = self.add(value, inner)
        self.stopped = False
        return out

    def _checkpointed(self, function: Maker, value: Value, trains: bool) -> Value:
        """Keep the input alone; run the function again when its backward pass comes.

        torch keeps the input also where nothing needs a gradient (the frozen layers below the trained ones).
        """
        if not self.tape.recording:
            return function(value)
        if not (trains or value.node):
            self.shared.append(value.kept())
            return function(value)
        self.tape.recording = False
        out = function(value)
        self.tape.recording = True
        kept, width, size = value.kept(), value.width, value.size

        def again() -> tuple[Node, Node]:
            start = Value(kept, width, size)
            start.node = None if parent is None else self.tape.node([], None)
            before, self.casts, self.tape.phase = self.casts, {}, "recompute"
            self.recomputing = True
            result = function(start)
            self.recomputing, self.casts, self.tape.phase = False, before, "backward"
            assert result.node is not None
            return result.node, start.node or self.tape.node([], None)

        parent = value.node
        out.node = self.tape.node([parent], None)
        out.node.again = again
        return out

    # -- model --------------------------------------------------------------------------------------------------

    @property
    def cosine_size(self) -> int:
        """Bytes of an entry of the rotary cosines: the format of the embedding."""
        return 4 if self.layout.ends_trained else 2

    def _hidden(self) -> Value:
        """Embedding, layers, final norm."""
        shape, trained = self.shape, self.layout.ends_trained
        value = self.new(shape.hidden, self.cosine_size, shape.hidden * self.cosine_size)
        if trained:
            value = self.tape.record(value, (), self._embedding_backward, trains=True)
        waves = [self.new(shape.head_dim, self.cosine_size).kept() for _ in range(2)]
        mask = self._mask() if self.rows.masked else None
        if self.tape.recording:
            # layers keep the waves; checkpointed ones hold on to their arguments, the mask among them
            self.shared += [*waves, mask] if self.layout.checkpointing else waves
        for index, weights in enumerate(self.layout.layers):
            trains = weights == "trained" or (bool(self.layout.lora_targets) and self.adapter)
            if self.layout.checkpointing:
                value = self._checkpointed(partial(self.layer, index=index), value, trains)
            else:
                value = self.layer(value, index)
        value = self.norm(value, "final_norm", trained=trained)
        del mask, waves
        return value

    def _mask(self) -> Buffer:
        """Which positions see which, a byte each: those before it, and those of its document, at once."""
        pairs = self.rows.count * self.rows.width
        earlier, own = self.plain(pairs, "temporaries"), self.plain(pairs, "temporaries")
        mask = self.plain(pairs, "activations")
        del earlier, own
        return mask

    def _embedding_backward(self, _: Value) -> tuple[Value | None, ...]:
        gradient = self.plain(4 * self.shape.embedding, "temporaries", 4.0 * self.rows.count * self.shape.hidden)
        if self.head_gradient:
            self.tape.spend(3.0 * gradient.count)
        self.accumulate("embedding", self.head_gradient.pop() if self.head_gradient else gradient)
        return ()

    def _log_probs(self) -> Value:
        """training.log_probs.token_log_probs: the head on the trained positions, chunk by chunk."""
        hidden = self._hidden()
        width, size, count = hidden.width, hidden.size, self.rows.trained

        def gather(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, size, width * size),)

        rows = self.tape.record(self.new(width, size, width * size, rows=count), (hidden,), gather)
        chunk = max(1, LOGIT_BYTES // (4 * self.shape.vocabulary))
        if count <= chunk:
            return self._chunk(rows, count)
        # All chunks share one 16-bit copy of a trained head, and their gradients for it are added up in 16 bit.
        shared = self._head_weight().node if self.layout.ends_trained else None
        pieces = []
        for start in range(0, count, chunk):
            length = min(chunk, count - start)
            function = partial(self._chunk, count=length, shared=shared)
            pieces.append(self._checkpointed(function, self._slice(rows), self.layout.ends_trained))
        return self._join(pieces)

    def _head_weight(self) -> Value:
        name = "tied head" if self.shape.tied else "head"
        return self.half_weight(name, self.shape.hidden * self.shape.vocabulary)

    def _slice(self, rows: Value) -> Value:
        width, size, count = rows.width, rows.size, self.rows.trained
        part = Value(rows.buffer, width, size)

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, size, rows=count),)

        return self.tape.record(part, (rows,), backward)

    def _join(self, pieces: list[Value]) -> Value:
        out = Value(Buffer(self.memory, 4 * self.rows.trained, "temporaries"), 1, 4)
        return self.tape.record(out, tuple(pieces), lambda gradient: (gradient,) * len(pieces))

    def _chunk(self, rows: Value, count: int, shared: Node | None = None) -> Value:
        """Logits of some positions and the log-probability of their targets."""
        vocabulary, trained = self.shape.vocabulary, self.layout.ends_trained
        logits = self._head(rows, count, shared)
        wide = self.new(vocabulary, 4, 2 * vocabulary, rows=count, part="logits")

        def narrow(_: Value) -> tuple[Value | None, ...]:
            return (self.new(vocabulary, 2, 4 * vocabulary, rows=count, part="logits"),)

        wide = self.tape.record(wide, (logits,), narrow)
        del logits
        normed = self.new(vocabulary, 4, 4 * vocabulary, rows=count, part="logits")
        kept = normed.buffer if self.tape.records(wide) else None

        def softmax_backward(_: Value) -> tuple[Value | None, ...]:
            assert kept is not None
            return (self.new(vocabulary, 4, 8 * vocabulary, rows=count, part="logits"),)

        def pick_backward(_: Value) -> tuple[Value | None, ...]:
            assert kept is not None
            return (self.new(vocabulary, 4, rows=count, part="logits"),)

        normed = self.tape.record(normed, (wide,), softmax_backward, trains=trained)
        picked = self.new(1, 4, 4, rows=count)
        return self.tape.record(picked, (normed,), pick_backward)

    def _head(self, rows: Value, count: int, shared: Node | None) -> Value:
        """The output projection; frozen in 16 bit, or trained in float32."""
        hidden, vocabulary = self.shape.hidden, self.shape.vocabulary
        if not self.layout.ends_trained:
            out = self.product(hidden, vocabulary, rows=count, part="logits")
            return self.tape.record(out, (rows,), lambda _: (self.product(vocabulary, hidden, rows=count),))
        weight = self._head_weight()
        weight.node = shared or weight.node
        narrow = self._narrow_rows(rows, count)
        kept = (narrow.kept(), weight.buffer) if self.tape.recording else ()
        out = self.product(hidden, vocabulary, rows=count, part="logits")

        def backward(_: Value) -> tuple[Value | None, ...]:
            assert kept
            gradient = self.weight_product(hidden, vocabulary, rows=count)
            return self.product(vocabulary, hidden, rows=count), gradient

        return self.tape.record(out, (narrow, weight), backward)

    def _narrow_rows(self, rows: Value, count: int) -> Value:
        width = rows.width

        def backward(_: Value) -> tuple[Value | None, ...]:
            return (self.new(width, 4, 2 * width, rows=count),)

        return self.tape.record(self.new(width, 2, 4 * width, rows=count), (rows,), backward)
