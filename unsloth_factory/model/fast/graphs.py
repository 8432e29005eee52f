"""The stack as CUDA graphs: a micro-batch of 8B layers is 2,800 launches, and issuing them takes longer than computing.

A graph has fixed shapes. So tokens are padded to a multiple of `STEP` by a document of padding at the end, whose
gradient is 0; the number of documents and the longest one are rounded up likewise. Forward and backward pass are two
graphs, between which the caller computes the loss. All graphs share one pool of memory: only one micro-batch is under
way at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.launch import power_of_two
from unsloth_factory.model.fast.layer import Row, Saving

STEP = 256
"""Tokens: padding costs 6 % at most from 2,048 tokens on."""
LEAST_DOCUMENTS = 8
LEAST_LONGEST = 512
WARM_UPS = 2
"""Passes before a capture: libraries set up their workspaces, kernels are compiled."""


@dataclass(frozen=True)
class Bucket:
    """Everything that is fixed in a graph."""

    tokens: int
    documents: int
    longest: int
    plan: tuple[Saving, ...]

    @classmethod
    def of(cls, lengths: tuple[int, ...], plan: Callable[[int], list[Saving]]) -> Bucket:
        """The bucket of a packed row."""
        tokens = -(-sum(lengths) // STEP) * STEP
        return cls(
            tokens=tokens,
            documents=max(LEAST_DOCUMENTS, power_of_two(len(lengths) + 1)),
            longest=max(LEAST_LONGEST, power_of_two(max(lengths)), STEP),
            plan=tuple(plan(tokens)),
        )


class _Graph:
    """One captured bucket: fixed places for what goes in and comes out."""

    def __init__(self, bucket: Bucket, hidden: int, half_head: int, dtype: torch.dtype, device: torch.device) -> None:
        self.bucket = bucket
        self.x = torch.zeros(bucket.tokens, hidden, dtype=dtype, device=device)
        self.gradient = torch.zeros(bucket.tokens, hidden, dtype=dtype, device=device)
        borders = torch.full((bucket.documents + 1,), bucket.tokens, dtype=torch.int32, device=device)
        borders[0] = 0
        lengths = (bucket.longest,) + (0,) * (bucket.documents - 1)  # only the longest is read
        angles = torch.zeros(2, bucket.tokens, half_head, dtype=torch.float32, device=device)
        self.row = Row(angles[0], angles[1], Documents(lengths, borders))
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        self.hidden = torch.empty(0)

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
        self._pool: Any = None

    def run(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """Normed hidden states [T, h], differentiable; valid until the next micro-batch."""
        bucket = Bucket.of(row.documents.lengths, self.decoder.planner.plan)
        graph = self._graphs.get(bucket) or self._capture(bucket, x, row)
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return _Replay.apply(anchor, self.decoder, graph, x, row)

    def _capture(self, bucket: Bucket, x: torch.Tensor, row: Row) -> _Graph:
        decoder = self.decoder
        graph = _Graph(bucket, x.shape[1], decoder.spec.heads.size // 2, x.dtype, x.device)
        graph.load(x, row)
        kept = decoder.gradients.snapshot()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(WARM_UPS):
                hidden, saved = decoder.forward_stack(graph.x, graph.row, bucket.plan)
                decoder.backward_stack(graph.gradient, hidden, saved, graph.row)
                del hidden, saved
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with torch.no_grad():
            with torch.cuda.graph(graph.forward_graph, pool=self._pool):
                last, saved = decoder.forward_stack(graph.x, graph.row, bucket.plan)
                graph.hidden = decoder.final_norm(last)
            with torch.cuda.graph(graph.backward_graph, pool=self._pool):
                decoder.backward_stack(graph.gradient, last, saved, graph.row)
        decoder.gradients.restore(kept)
        self._graphs[bucket] = graph
        return graph


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, decoder: Any, graph: _Graph, x: torch.Tensor, row: Row) -> torch.Tensor:
        ctx.decoder, ctx.graph, ctx.tokens = decoder, graph, len(x)
        graph.load(x, row)
        graph.forward_graph.replay()
        return graph.hidden[: len(x)].clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, None, None, None, None]:
        graph: _Graph = ctx.graph
        ctx.decoder.gradients.prepare()
        graph.gradient[: ctx.tokens].copy_(gradients[0])
        graph.gradient[ctx.tokens :].zero_()
        graph.backward_graph.replay()
        return None, None, None, None, None
