"""The stack as CUDA graphs: a micro-batch of 8B layers is 2,800 launches, and issuing them takes longer than computing.

A graph has fixed shapes. So tokens are padded to a multiple of `STEP` by a document of padding at the end, whose
gradient is 0; the number of documents is rounded up likewise. Forward and backward pass are two graphs, between which
the caller computes the loss. All graphs share one pool of memory: only one micro-batch is under way at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from unsloth_factory.kernels.attention import Documents, prepare
from unsloth_factory.kernels.launch import power_of_two
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.layer import Row, Saving
from unsloth_factory.model.fast.planner import STEP, available, workspace

LEAST_LONGEST = 512
"""Tokens of the longest document that attention is launched for, at least."""


@dataclass(frozen=True)
class Bucket:
    """Everything that is fixed in a graph."""

    tokens: int
    documents: int
    """Places for documents; those that are not used are empty."""
    longest: int
    """Attention launches blocks for so many tokens in each of the places. Those beyond a document's end return at once,
    but 2,048 tokens in 8 places where 1,024 in 2 would do cost 3 ms of 130."""

    @classmethod
    def of(cls, lengths: tuple[int, ...]) -> Bucket:
        """The bucket of a packed row; there is always room for one document of padding."""
        tokens = -(-sum(lengths) // STEP) * STEP
        longest = min(tokens, power_of_two(max(LEAST_LONGEST, *lengths)))
        return cls(tokens, power_of_two(len(lengths) + 1), longest)


class _Places:
    """What goes in and comes out, at addresses that all graphs share; and the arena between the two passes."""

    def __init__(self, decoder: Any, tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        hidden = decoder.spec.hidden
        self.tokens = tokens
        self.x, self.gradient, self.hidden = torch.zeros(3, tokens, hidden, dtype=dtype, device=device)
        self.angles = torch.zeros(2, tokens, decoder.spec.heads.size // 2, dtype=torch.float32, device=device)
        self.arena = Arena(decoder.planner.room(tokens), dtype, device)


class _Graph:
    """One captured bucket."""

    def __init__(self, bucket: Bucket, places: _Places) -> None:
        self.bucket = bucket
        self.x, self.gradient, self.hidden = (
            place[: bucket.tokens] for place in (places.x, places.gradient, places.hidden)
        )
        borders = torch.full((bucket.documents + 1,), bucket.tokens, dtype=torch.int32, device=self.x.device)
        borders[0] = 0
        lengths = (bucket.longest,) + (0,) * (bucket.documents - 1)  # of these only the longest is read
        cos, sin = places.angles[:, : bucket.tokens]
        self.row = Row(cos, sin, Documents(lengths, borders), places.arena)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()

    def load(self, x: torch.Tensor, row: Row) -> None:
        """Put a micro-batch into the fixed places."""
        tokens = len(x)
        self.x[:tokens].copy_(x)
        self.x[tokens:].zero_()
        self.row.cos[:tokens].copy_(row.cos)
        self.row.sin[:tokens].copy_(row.sin)
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
        self._warm = False
        self.passes = 0
        """Forward passes so far: a backward pass belongs to the last one."""

    def takes(self, row: Row) -> bool:
        """Whether a micro-batch goes through graphs: not where inputs must leave the GPU, which no graph can hold."""
        return Saving.OFFLOAD not in self.decoder.planner.plan(Bucket.of(row.documents.lengths).tokens)

    def run(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """Normed hidden states [T, h], differentiable; valid until the next micro-batch."""
        bucket = Bucket.of(row.documents.lengths)
        graph = self._graphs.get(bucket) or self._capture(bucket, x)
        self.passes += 1
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _Replay.apply(anchor, self.decoder, graph, x, row)

    def drop(self) -> None:
        """Give back the graphs and their memory; they are made again when they are needed."""
        self._graphs.clear()
        self._places, self._pool, self._pooled = None, None, 0
        self.decoder.planner.arena = None

    def give_way(self) -> None:
        """Before a micro-batch so long that it needs all memory and goes without graphs: drop them."""
        if self._graphs:
            self.drop()
            torch.cuda.empty_cache()

    def make_room(self, tokens: int) -> None:
        """Before a pass without graphs: drop them where their memory is needed."""
        device = self.decoder.norm.weight.device
        if self._graphs and available(device) - self._pooled < workspace(self.decoder.spec, tokens, 2):
            self.drop()
            torch.cuda.empty_cache()

    def _capture(self, bucket: Bucket, x: torch.Tensor) -> _Graph:
        decoder = self.decoder
        if not self._warm:
            self._warm_up(x)
        if self._places is None or self._places.tokens < bucket.tokens:
            self.drop()
            torch.cuda.empty_cache()
            decoder.planner.arena = decoder.planner.room(bucket.tokens)
            self._places = _Places(decoder, bucket.tokens, x.dtype, x.device)
        plan = decoder.planner.plan(bucket.tokens)
        graph = _Graph(bucket, self._places)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(x.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.no_grad():
            with torch.cuda.graph(graph.forward_graph, pool=self._pool):
                last, saved = decoder.forward_stack(graph.x, graph.row, plan)
                decoder.final_norm(last, out=graph.hidden)
            with torch.cuda.graph(graph.backward_graph, pool=self._pool):
                decoder.backward_stack(graph.gradient, last, saved, graph.row)
        del last, saved
        self._pooled += torch.cuda.memory_reserved(x.device) - before
        self._graphs[bucket] = graph
        return graph

    def _warm_up(self, x: torch.Tensor) -> None:
        """Small passes of each kind: kernels are compiled, libraries set up what they need."""
        decoder, kept = self.decoder, self.decoder.adapter.snapshot()
        heads = decoder.spec.heads
        prepare((heads.queries, heads.keys), heads.size, x.dtype, x.device)
        rows = torch.zeros(STEP, x.shape[1], dtype=x.dtype, device=x.device)
        angles = torch.zeros(STEP, decoder.spec.heads.size // 2, dtype=torch.float32, device=x.device)
        row = Row(angles, angles, Documents.of([STEP], x.device))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for saving in (Saving.KEEP, Saving.DROP_GATE_UP, Saving.RECOMPUTE):
                last, saved = decoder.forward_stack(rows, row, [saving] * len(decoder.stack))
                decoder.final_norm(last)
                decoder.backward_stack(rows, last, saved, row)
        torch.cuda.current_stream().wait_stream(stream)
        decoder.adapter.restore(kept)
        self._warm = True


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, decoder: Any, graph: _Graph, x: torch.Tensor, row: Row) -> torch.Tensor:
        ctx.decoder, ctx.graph, ctx.tokens = decoder, graph, len(x)
        ctx.number = decoder.graphs.passes
        graph.load(x, row)
        graph.forward_graph.replay()
        return graph.hidden[: len(x)].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None, None]:
        graph: _Graph = ctx.graph
        graphs = ctx.decoder.graphs
        assert graphs is not None
        assert graphs.passes == ctx.number, "a later forward pass has taken this one's memory"
        ctx.decoder.adapter.prepare()
        graph.gradient[: ctx.tokens].copy_(gradients[0])
        graph.gradient[ctx.tokens :].zero_()
        graph.backward_graph.replay()
        return None, None, None, None, None
