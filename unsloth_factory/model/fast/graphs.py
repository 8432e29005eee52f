"""The stack as CUDA graphs: a micro-batch of 8B layers is 2,800 launches, and issuing them takes longer than computing.

A graph has fixed shapes. So tokens are padded to a multiple of `STEP` by a document of padding at the end, whose
gradient is 0; the number of documents is rounded up likewise. Forward and backward pass are two graphs, between which
the caller computes the loss; where only some positions are asked for, they reach to the last attention, and the tail
is launched between them, too. All graphs share one pool of memory: only one micro-batch is under way at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from unsloth_factory.kernels.attention import Documents, launches_by_tokens, prepare
from unsloth_factory.kernels.launch import power_of_two
from unsloth_factory.kernels.transfer import to_device
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.layer import Row, Saving
from unsloth_factory.model.fast.planner import STEP, available
from unsloth_factory.model.fast.tail import pays, spread

LEAST_LONGEST = 512
"""Tokens of the longest document that attention is launched for, at least."""
LEAST_PLACES = 8
"""Places for documents at least, where attention's launch does not depend on how long they are."""


@dataclass(frozen=True)
class Bucket:
    """Everything that is fixed in a graph."""

    tokens: int
    documents: int
    """Places for documents; those that are not used are empty."""
    longest: int
    """Attention launches blocks for so many tokens in each of the places. Those beyond a document's end return at once,
    but 2,048 tokens in 8 places where 1,024 in 2 would do cost 3 ms of 130."""
    whole: bool = True
    """All layers; otherwise they end at the last attention, and the tail is computed for some positions alone."""

    @classmethod
    def of(cls, lengths: tuple[int, ...], by_tokens: bool = False) -> Bucket:
        """The bucket of a packed row; there is always room for one document of padding.

        Args:
            lengths: Tokens of the documents.
            by_tokens: Attention launches as many blocks as there are tokens, however long the documents are
                (`attention.launches_by_tokens`): so rows of as many tokens share a graph.
        """
        tokens, places = -(-sum(lengths) // STEP) * STEP, power_of_two(len(lengths) + 1)
        if by_tokens:
            return cls(tokens, max(LEAST_PLACES, places), max(LEAST_LONGEST, tokens))
        return cls(tokens, places, min(tokens, power_of_two(max(LEAST_LONGEST, *lengths))))


class _Places:
    """What goes in and comes out, at addresses that all graphs share; and the arena between the two passes."""

    def __init__(self, decoder: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        heads, hidden = decoder.spec.heads, decoder.spec.hidden
        self.tokens = tokens
        self.x, self.gradient = torch.zeros(2, tokens, hidden, dtype=dtype, device=device)
        self.outcome = torch.zeros(tokens * max(hidden, heads.queries * heads.size), dtype=dtype, device=device)
        """The forward pass's hidden states, or the gradient at what was attended to last."""
        self.angles = torch.zeros(2, tokens, decoder.spec.heads.size // 2, dtype=torch.float32, device=device)
        # copied from the CPU's memory, not filled on the GPU: what is written there waits for all that runs
        self.seed = to_device(torch.zeros(1, dtype=torch.int64), device) if decoder.dropout else None
        self.arena = Arena(decoder.planner.room(tokens), dtype, device)


class _Graph:
    """One captured bucket."""

    def __init__(self, bucket: Bucket, places: _Places) -> None:
        self.bucket = bucket
        self.x, self.gradient = places.x[: bucket.tokens], places.gradient[: bucket.tokens]
        self.outcome = places.outcome
        self.last = self.wide = self.x
        """Input of the last layer and what its `attend` made, where the graph ends there."""
        self.kept = 0
        """Numbers of the arena that the layers keep; what the tail keeps lies behind them."""
        # not filled on the GPU: a single number that is written there first waits for all that runs
        borders = to_device(torch.tensor([0] + [bucket.tokens] * bucket.documents, dtype=torch.int32), self.x.device)
        lengths = (bucket.longest,) + (0,) * (bucket.documents - 1)  # of these only the longest is read
        cos, sin = places.angles[:, : bucket.tokens]
        self.row = Row(cos, sin, Documents(lengths, borders), places.arena, places.seed)
        self.arena = places.arena
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def rows(self, columns: int) -> torch.Tensor:
        """[tokens, columns] in the place of the outcome."""
        return self.outcome[: self.bucket.tokens * columns].view(self.bucket.tokens, columns)

    def load(self, x: torch.Tensor, row: Row) -> None:
        """Put a micro-batch into the fixed places."""
        tokens = len(x)
        self.x[:tokens].copy_(x)
        self.x[tokens:].zero_()
        self.row.cos[:tokens].copy_(row.cos)
        self.row.sin[:tokens].copy_(row.sin)
        if self.row.seed is not None:
            assert row.seed is not None
            self.row.seed.copy_(row.seed)
        borders = row.documents.borders
        self.row.documents.borders[: len(borders)].copy_(borders)
        self.row.documents.borders[len(borders) :].fill_(self.bucket.tokens)


class Graphs:
    """Captured graphs of one decoder, made when a bucket is first met."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self._graphs: dict[Bucket, _Graph] = {}
        self._places: _Places | None = None
        self._pool: Any = None
        self._pooled = 0
        self._stream: torch.cuda.Stream | None = None
        """Of captures and the passes that warm up for them."""
        self._by_tokens = False
        self.passes = 0
        """Forward passes so far: a backward pass belongs to the last one."""

    def takes(self, row: Row) -> bool:
        """Whether a micro-batch goes through graphs: not where inputs must leave the GPU, which no graph can hold.

        Nor where dropout is switched off, which graphs were recorded with.
        """
        if self.decoder.dropout and row.seed is None:
            return False
        return Saving.OFFLOAD not in self.decoder.planner.plan(Bucket.of(row.documents.lengths).tokens)

    def run(self, x: torch.Tensor, row: Row, index: torch.Tensor | None = None) -> torch.Tensor:
        """Normed hidden states [n, h] of some positions, or [T, h] of all; differentiable until the next micro-batch.

        Args:
            x: [T, h] input of the stack.
            row: Of the micro-batch.
            index: int64 [n] on the device; None: all.
        """
        if self._stream is None:
            self._stream = self._warm_up(x)
        bucket = Bucket.of(row.documents.lengths, self._by_tokens)
        bucket = replace(bucket, whole=not self._has_tail(bucket.tokens, index))
        graph = self._graphs.get(bucket) or self._capture(bucket, x)
        self.passes += 1
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _Replay.apply(anchor, self.decoder, graph, x, row, index)

    def _has_tail(self, tokens: int, index: torch.Tensor | None) -> bool:
        decoder = self.decoder
        if index is None or decoder.planner.plan(tokens)[-1] is not Saving.KEEP:
            return False
        return pays(decoder.spec, tokens, len(index))

    def drop(self) -> None:
        """Give back the graphs and their memory; they are made again when they are needed."""
        self._graphs.clear()
        self._places, self._pool, self._pooled = None, None, 0
        self.decoder.planner.arena = None

    def give_way(self) -> None:
        """Before a micro-batch so long that it needs all memory and goes without graphs: drop them."""
        if self._places is not None:
            self.drop()
            torch.cuda.empty_cache()

    def make_room(self, tokens: int) -> None:
        """Before a pass without graphs: drop them where their memory is needed."""
        device = self.decoder.norm.weight.device
        if self._graphs and available(device) - self._pooled < self.decoder.planner.workspace(tokens):
            self.drop()
            torch.cuda.empty_cache()

    def _capture(self, bucket: Bucket, x: torch.Tensor) -> _Graph:
        decoder = self.decoder
        if self._places is None or self._places.tokens < bucket.tokens:
            self.drop()
            torch.cuda.empty_cache()
            decoder.planner.arena = decoder.planner.room(bucket.tokens)
            self._places = _Places(decoder, bucket.tokens, x.dtype, x.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        before = torch.cuda.memory_reserved(x.device)
        graph = None
        with suppress(torch.OutOfMemoryError):
            graph = self._record(bucket, self._places)
        if graph is None:  # once more, with what torch holds for other uses
            self._pool = self._pool if self._graphs else torch.cuda.graph_pool_handle()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(x.device)
            graph = self._record(bucket, self._places)
        self._pooled += torch.cuda.memory_reserved(x.device) - before
        self._graphs[bucket] = graph
        return graph

    @torch.no_grad()
    def _record(self, bucket: Bucket, places: _Places) -> _Graph:
        decoder, graph = self.decoder, _Graph(bucket, places)
        plan = decoder.planner.plan(bucket.tokens)
        if not bucket.whole:
            self._record_to_last_attention(graph, plan)
            return graph
        with self._recording(graph.forward_graph):
            last, saved = decoder.forward_stack(graph.x, graph.row, plan)
            decoder.final_norm(last, out=graph.rows(decoder.spec.hidden))
        with self._recording(graph.backward_graph):
            decoder.backward_stack(graph.gradient, last, saved, graph.row)
        return graph

    def _record_to_last_attention(self, graph: _Graph, plan: Sequence[Saving]) -> None:
        decoder, heads = self.decoder, self.decoder.spec.heads
        with self._recording(graph.forward_graph):
            graph.last, graph.wide, saved = decoder.attend_stack(graph.x, graph.row, plan)
        graph.kept = graph.arena.used
        with self._recording(graph.backward_graph):
            dattended = graph.rows(heads.queries * heads.size)
            decoder.attend_backward_stack(dattended, graph.gradient, saved, graph.row)

    @contextmanager
    def _recording(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """What is launched inside goes into the graph.

        `torch.cuda.graph` first waits for the GPU and gives back all cached memory, pinned memory too; this does
        neither, so that the GPU computes earlier micro-batches meanwhile. Nothing that runs is touched: recording
        launches nothing.
        """
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()

    def _warm_up(self, x: torch.Tensor) -> torch.cuda.Stream:
        """Small passes of each kind: kernels are compiled, libraries set up what they need on the stream returned."""
        decoder, kept = self.decoder, self.decoder.adapter.snapshot()
        heads = decoder.spec.heads
        kinds = ((heads.queries, heads.keys), heads.size, x.dtype, x.device)
        prepare(*kinds)
        self._by_tokens = launches_by_tokens(*kinds)
        rows = torch.zeros(STEP, x.shape[1], dtype=x.dtype, device=x.device)
        angles = torch.zeros(STEP, decoder.spec.heads.size // 2, dtype=torch.float32, device=x.device)
        seed = to_device(torch.zeros(1, dtype=torch.int64), x.device) if decoder.dropout else None
        row = Row(angles, angles, Documents.of([STEP], x.device), seed=seed)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for saving in (Saving.KEEP, Saving.DROP_GATE_UP, Saving.RECOMPUTE):
                last, saved = decoder.forward_stack(rows, row, [saving] * len(decoder.stack))
                decoder.final_norm(last)
                decoder.backward_stack(rows, last, saved, row)
        torch.cuda.current_stream().wait_stream(stream)
        decoder.adapter.restore(kept)
        return stream


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: torch.Tensor,
        decoder: Any,
        graph: _Graph,
        x: torch.Tensor,
        row: Row,
        index: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.decoder, ctx.graph, ctx.index, ctx.tokens = decoder, graph, index, len(x)
        ctx.number = decoder.graphs.passes
        graph.load(x, row)
        graph.forward_graph.replay()
        if graph.bucket.whole:
            hidden = graph.rows(decoder.spec.hidden)
            return hidden[: len(x)].clone() if index is None else hidden.index_select(0, index)
        graph.arena.rewind(graph.kept)
        hidden, ctx.kept = decoder.tail.forward(graph.last, graph.wide, index, graph.arena, graph.row.seed)
        return hidden

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None, None, None]:
        graph: _Graph = ctx.graph
        decoder = ctx.decoder
        assert decoder.graphs is not None
        assert decoder.graphs.passes == ctx.number, "a later forward pass has taken this one's memory"
        decoder.adapter.prepare()
        if not graph.bucket.whole:
            dattended, dx = decoder.tail.backward(gradients[0], ctx.kept, graph.row.seed)
            spread(dattended, ctx.index, graph.rows(dattended.shape[1]))
            spread(dx, ctx.index, graph.gradient)
        elif ctx.index is not None:
            spread(gradients[0], ctx.index, graph.gradient)
        else:
            graph.gradient[: ctx.tokens].copy_(gradients[0])
            graph.gradient[ctx.tokens :].zero_()
        graph.backward_graph.replay()
        return None, None, None, None, None, None
