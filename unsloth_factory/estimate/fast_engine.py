"""What `--engine fast` takes of a card, and how quick it is there: its own planner, asked without the card.

Its memory is no sum of what a training needs but what there is: activations fill the room that weights, adapter and
optimizer leave, up to `MOST_TOKENS`; with less room layers recompute more, and then leave their inputs in the CPU's
memory, of which the machine is taken to have enough. So what is too large takes longer, and only what one layer alone
has no room for does not fit. It runs as CUDA graphs, whose pace the card
sets: with the same constants as here an H200 of another machine was as fast, where Python's pace had doubled.

The constants were fitted to f1 to f6 of benchmarks/plan_accuracy.py on an H200 (2026-11-22).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from unsloth_factory.estimate.memory import HOPPER_WORKSPACE, WORKSPACE, MemoryEstimate, Training
from unsloth_factory.estimate.rehearsal import PARTS, Part
from unsloth_factory.estimate.speed import ELEMENTWISE
from unsloth_factory.estimate.workload import Packed
from unsloth_factory.model.environment import FLASH_ATTENTION_4, is_installed
from unsloth_factory.model.gpus import Gpu
from unsloth_factory.model.shapes import ModelShape

if TYPE_CHECKING:
    from unsloth_factory.model.fast.planner import Planner
    from unsloth_factory.model.fast.spec import DecoderSpec

SIZE = 2
"""Bytes of a number that is computed with."""
SLACK = 1.017
"""Reserved by torch over what was in use at once, with what this module leaves out: 1.0 to 2.0 % in six runs."""
PRODUCTS = 0.95
"""Of the rate of large products: 750 of 791 TFLOP/s."""
DEQUANTISED = 0.95
"""Of a large copy's bandwidth: 4.1 of 4.24 TB/s."""
ATTENTION = (2.5, 2500.0)
"""Attention of a document of L tokens takes (a + b / L) times what a product of as many operations does: with
FlashAttention-2 on an H200 3.1 times at 4,096 tokens, 3.5 at 2,048, 10 at 300."""
HOPPER_ATTENTION = (1.2, 1500.0)
"""The same with FlashAttention-4: 1.5, 1.9 and 7.5 times."""
PARTS_OF = (3, 1, 2, 1)
"""Projections in each of the four fused ones; with dropout each has an input of its own."""
UPDATE_SECONDS = 0.012
"""Of a step: clipping, optimizer, batches; mostly Python's."""
CAPTURE_SECONDS = 2.8e-3
"""A layer's share of making the graph of a new size of micro-batch: 0.1 s with 36 layers."""


@dataclass(frozen=True)
class FastEngine:
    """One training on one card."""

    training: Training
    gpu: Gpu

    @cached_property
    def spec(self) -> DecoderSpec:
        """The decoder's shapes, as the engine has them."""
        from unsloth_factory.model.fast.spec import DecoderSpec, Heads

        shape = self.training.shape
        return DecoderSpec(
            family=shape.family,
            layers=shape.layers,
            hidden=shape.hidden,
            intermediate=shape.intermediate,
            heads=Heads(shape.heads, shape.kv_heads, shape.head_dim),
            vocabulary=shape.vocabulary,
            eps=1e-6,
            head_norm=shape.head_norms,
            attention_bias=(shape.qkv_bias, shape.output_bias),
            tied=shape.tied,
        )

    @cached_property
    def ranks(self) -> list[tuple[int, int, int]]:
        """(inputs K, outputs N, rank R) of the four fused projections."""
        shape = self.training.shape
        targets = {linear.name for linear in shape.targets(self.training.lora_target)}
        fused = []
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            linears = [linear for linear in shape.linears() if linear.name in names]
            rank = self.training.lora_rank * sum(linear.name in targets for linear in linears)
            fused.append((linears[0].in_features, sum(linear.out_features for linear in linears), -(-rank // 8) * 8))
        return fused

    @cached_property
    def resident(self) -> dict[Part, int]:
        """Bytes of what is there all the time, by part."""
        from unsloth_factory.model.fast.planner import SMALL

        training, shape = self.training, self.training.shape
        matrices = shape.layers * shape.layer_weights
        on_host = (self.training.low_memory or self.gpu.room < SMALL) and not shape.tied
        ends = shape.head + (0 if on_host else shape.embedding) + shape.hidden
        parts: dict[Part, int] = dict.fromkeys(PARTS, 0)
        parts["base weights"] = SIZE * (ends + shape.layers * shape.layer_vectors)
        parts["base weights"] += matrices // 2 if training.quantized else SIZE * matrices
        if training.quantized:  # a maximum of 8 bit for 64 weights, a scale of 32 bit for 256 of them
            parts["quantisation state"] = matrices // 64 + 4 * (matrices // 64 // 256)
        trained = sum(training.trained_parameters().values())
        copies = shape.layers * sum(rank * (inputs + outputs) for inputs, outputs, rank in self.ranks)
        parts["trained weights"] = 4 * trained + SIZE * copies
        parts["gradients"] = 4 * trained
        numbers = {"adamw": 8.0, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0.0}
        parts["optimizer state"] = int(numbers[training.optimizer] * trained)
        parts["workspace"] = HOPPER_WORKSPACE if training.capability >= (9, 0) else WORKSPACE
        return parts

    def planner(self) -> Planner:
        """The engine's planner, as it plans once all that is resident is there."""
        import torch

        from unsloth_factory.model.fast.planner import RESERVE, Planner

        planner = Planner(self.spec, torch.device("cuda"))
        planner.extra = 2 * sum(rank for _, _, rank in self.ranks)
        planner.dropout = self.training.lora_dropout
        planner.budget = self.gpu.room - sum(self.resident.values()) - RESERVE
        planner.host_budget = sys.maxsize
        if self.training.low_memory:
            planner.recompute_all()
        return planner

    @cached_property
    def budget(self) -> int | None:
        """Tokens up to which the samples of a step are put together; None: they stay as --batch_size says."""
        return self.planner().comfortable

    def memory(self, packed: Sequence[Packed]) -> MemoryEstimate:
        """Bytes at the fullest moment of a training of these micro-batches."""
        return self._estimate(self.settled(packed), *_most(packed))

    def least(self, packed: Sequence[Packed]) -> int:
        """Bytes without which it does not go even with every layer recomputed from an input in the CPU's memory."""
        planner = self.planner()
        planner.offload_all()
        return self._estimate(planner, _most(packed)[0], 1).reserved

    def pinned(self, packed: Sequence[Packed]) -> int:
        """Bytes of the CPU's memory that layer inputs take while these micro-batches are trained."""
        planner, hidden = self.settled(packed), self.training.shape.hidden
        return max(SIZE * hidden * tokens * planner.offloaded(tokens) for tokens in {_tokens(one) for one in packed})

    def settled(self, packed: Sequence[Packed]) -> Planner:
        """As it plans when the longest of these micro-batches has been tried: where that is too large, with less."""
        planner = self.planner()
        tokens, trained = _most(packed)
        while self._estimate(planner, tokens, trained).reserved > self.gpu.room:
            if planner.offloaded(tokens) == self.spec.layers - 1:
                break
            planner.tighten()
        return planner

    def _estimate(self, planner: Planner, tokens: int, trained: int) -> MemoryEstimate:
        from unsloth_factory.model.fast.head import CHUNK_BYTES
        from unsloth_factory.model.fast.planner import SCATTERED

        hidden = self.training.shape.hidden
        parts = dict(self.resident)
        parts["activations"] = planner.room(tokens)
        parts["logits"] = CHUNK_BYTES + 2 * SIZE * trained * hidden
        work = planner.workspace(tokens)
        parts["workspace"] += work
        # cosines and sines; the graphs' places for input, gradient and output, or what is lost without graphs
        parts["temporaries"] = 8 * tokens * (self.training.shape.head_dim // 2)
        scattered = int(SCATTERED * (work + parts["activations"]))
        parts["temporaries"] += scattered if planner.offloaded(tokens) else 3 * SIZE * tokens * hidden
        return MemoryEstimate(
            parts=parts,
            reserved=int(SLACK * sum(parts.values())),
            trained=sum(self.training.trained_parameters().values()),
        )

    @cached_property
    def _hopper(self) -> bool:
        """This installation has FlashAttention-4 for the card."""
        return self.gpu.capability[0] == 9 and is_installed(FLASH_ATTENTION_4)

    def seconds(self, steps: Sequence[Sequence[Packed]]) -> float:
        """Of all steps: micro-batches, updates, and the graphs of sizes that are new."""
        from unsloth_factory.model.fast.graphs import Bucket

        packed = [one for step in steps for one in step]
        planner = self.settled(packed)
        captured = [one for one in packed if not planner.offloaded(_tokens(one))]
        if captured and planner.forced is None:
            planner.arena = planner.room(max(_tokens(one) for one in captured))
        buckets = {Bucket.of(one.lengths, self._hopper) for one in captured}
        known: dict[int, dict[Any, int]] = {}
        for tokens in {_tokens(one) for one in packed}:
            plan = planner.plan(tokens)
            known[tokens] = {saving: plan.count(saving) for saving in set(plan)}
        passes = sum(self._pass_seconds(one, known[_tokens(one)]) for one in packed)
        captures = CAPTURE_SECONDS * self.training.shape.layers * len(buckets)
        return passes + UPDATE_SECONDS * len(steps) + captures

    def _pass_seconds(self, packed: Packed, plan: dict[Any, int]) -> float:
        """Forward and backward pass of one micro-batch whose layers are kept as `plan` counts them."""
        from unsloth_factory.model.fast.layer import Saving

        assert self.gpu.products is not None
        assert self.gpu.bandwidth is not None
        shape, tokens = self.training.shape, _tokens(packed)
        again = {Saving.KEEP: (), Saving.DROP_GATE_UP: (2,), Saving.RECOMPUTE: (0, 1, 2)}
        again[Saving.OFFLOAD] = again[Saving.RECOMPUTE]  # its copies hide behind the arithmetic
        products = moved = 0.0
        attended = 3.5 * shape.layers
        for saving, layers in plan.items():
            for place, (inputs, outputs, rank) in enumerate(self.ranks):
                forwards = 2 if place in again[saving] else 1
                products += layers * 2 * tokens * (forwards * (inputs + rank) * outputs + inputs * (outputs + rank))
                # t = x A^T, gradients of A and B: they read and write more than they compute
                moved += layers * 2 * SIZE * tokens * (inputs + outputs) / ELEMENTWISE
                if self.training.quantized:
                    moved += layers * (forwards + 1) * inputs * outputs * (0.5 + SIZE) / DEQUANTISED
                if self.training.lora_dropout:  # three passes over the input of each matrix, and a product's output
                    moved += layers * 8 * SIZE * tokens * inputs * PARTS_OF[place] / ELEMENTWISE
            forwards = 2 if saving in (Saving.RECOMPUTE, Saving.OFFLOAD) else 1
            attended += layers * (forwards - 1)
            moved += layers * SIZE * tokens * _elementwise(shape, forwards) / ELEMENTWISE
        products -= 2 * tokens * self.ranks[0][0] * self.ranks[0][1]  # no gradient below the first layer
        products += 4.0 * packed.trained * shape.hidden * shape.vocabulary
        moved += 4.0 * SIZE * packed.trained * shape.vocabulary / ELEMENTWISE
        a, b = HOPPER_ATTENTION if self._hopper else ATTENTION
        squares = sum(length * (a * length + b) for length in packed.lengths)
        attention = 2.0 * attended * shape.query_width * squares
        return (products / PRODUCTS + attention) / self.gpu.products + moved / self.gpu.bandwidth


def _elementwise(shape: ModelShape, forwards: int) -> int:
    """Numbers a token that a layer's norms, rotation, SwiGLU and copies read and write in both passes."""
    h, i, q, kv = shape.hidden, shape.intermediate, shape.query_width, shape.kv_width
    rotated = q + 2 * kv + q + kv
    forward = 4 * h + rotated + 3 * i + 2 * q
    backward = 12 * h + 2 * rotated + 6 * i + 2 * q
    return forwards * forward + backward


def _most(packed: Sequence[Packed]) -> tuple[int, int]:
    """The most tokens, and the most trained ones, of a micro-batch."""
    return max(_tokens(one) for one in packed), max(one.trained for one in packed)


def _tokens(packed: Packed) -> int:
    """Of a micro-batch as it is computed: rounded up by a document of padding."""
    from unsloth_factory.model.fast.planner import STEP

    return -(-sum(packed.lengths) // STEP) * STEP


def why_not_fast(training: Training) -> str | None:
    """Why --engine auto would not take the fast engine for this training on a GPU, or None."""
    from unsloth_factory.model.fast.spec import BLOCK_SIZE, FAMILIES

    shape = training.shape
    if training.method != "sft":
        return f"--method {training.method}"
    if training.kind != "lora":
        return f"--finetuning_type {training.kind}"
    if shape.prequantized:
        return "weights that are stored in 4 bit"
    if shape.family not in FAMILIES or shape.mlp_bias or shape.sliding_window is not None:
        return "this model"
    widths = (shape.hidden, shape.intermediate, shape.query_width)
    return "the rows of its 4-bit weights" if training.quantized and any(w % BLOCK_SIZE for w in widths) else None
