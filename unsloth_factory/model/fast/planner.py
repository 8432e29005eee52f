"""Which layers keep their activations, from the tokens of the micro-batch and the memory that is free."""

from __future__ import annotations

import torch

from unsloth_factory.model.fast.head import CHUNK_BYTES
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.spec import DecoderSpec
from unsloth_factory.model.host_memory import free_memory

RESERVE = 900 * 2**20
"""Bytes left free: 500 MB for logits, hidden states and their gradients outside the layers, the rest for gaps."""

STEP = 128
"""Tokens: micro-batches are planned, and their graphs made, for multiples of it."""
SMALL = 24 * 2**30
"""Bytes: a card, or the part of it that may be used, on which the memory of an 8B embedding is better spent on
activations: 1.2 GB are 400 of 2,700 tokens that a micro-batch keeps everything of."""
ROUNDING = 2**17
"""Bytes that some hundred tensors of an arena may lose to alignment."""
MOST_TOKENS = 8192
"""Of a micro-batch that is put together here: larger ones are no faster."""
GAPS = 300 * 10**6
"""Bytes of `RESERVE` that stay free even for a micro-batch that fits by the recomputation of every layer alone."""
SCATTERED = 0.1
"""Of what a pass without graphs needs, more for what lies between its tensors: the allocator has no arena to put them
in. Replayed with its rules (best fit, blocks split and joined), 16,000 to 53,000 tokens of Qwen3-8B then run within
14.2 GiB without giving a block back; without it some of them do not."""
HOST_SHARE = 0.75
"""Of the CPU's free memory that layer inputs may take. It is pinned: the system cannot move it out of the way."""


class Planner:
    """Decides for one device; `forced` overrides it."""

    def __init__(self, spec: DecoderSpec, device: torch.device) -> None:
        self.spec = spec
        self.device = device
        self.forced: list[Saving] | Saving | None = None
        self.budget: int | None = None
        """Bytes for activations and workspace; measured at the first plan, so that equal micro-batches stay equal."""
        self.extra = 0
        """Numbers a token and layer that LoRA adds to what is kept."""
        self.dropout = False
        """LoRA dropout, which needs room for what it has left of a projection's input."""
        self.float8 = False
        """Products in float8, whose factors lie beside the 16-bit ones."""
        self.arena: int | None = None
        """Bytes for activations, once their place has been allocated."""
        self.offloads_all = False
        """No layer but the last keeps its input on the GPU."""
        self.host_budget: int | None = None
        """Bytes of the CPU's memory for layer inputs; measured when they are first needed."""

    @property
    def recomputes_all(self) -> bool:
        """Every layer is recomputed, whatever memory there is."""
        return self.forced is Saving.RECOMPUTE

    def recompute_all(self) -> None:
        """From now on recompute every layer."""
        self.forced = Saving.RECOMPUTE

    def offload_all(self) -> None:
        """From now on recompute every layer, from an input in the CPU's memory as far as that has room."""
        self.forced, self.offloads_all = Saving.RECOMPUTE, True

    def tighten(self) -> None:
        """After memory ran out: plan with a tenth less."""
        if self.budget is not None:
            self.budget -= abs(self.budget) // 10

    @property
    def comfortable(self) -> int | None:
        """The most tokens, a multiple of `STEP`, for which every layer keeps all; None where that is not planned."""
        if self.device.type != "cuda" or self.forced is not None:
            return None
        tokens = STEP
        while self._keeps_all(tokens + STEP):
            tokens += STEP
        return tokens

    def _keeps_all(self, tokens: int) -> bool:
        choices = divide(self.spec, tokens, self.room(tokens) - ROUNDING, 2, self.extra)
        return tokens <= MOST_TOKENS and all(choice is Saving.KEEP for choice in choices)

    def room(self, tokens: int) -> int:
        """Bytes for the activations of a micro-batch."""
        if away := self.offloaded(tokens):
            return launched(self.spec, tokens, 2, away, self.extra)
        if self.forced is not None:
            plan = self.plan(tokens)
            return ROUNDING + 2 * tokens * sum(saved_numbers(self.spec, saving, self.extra) for saving in plan)
        if self.arena is not None:
            return self.arena
        least, most = (
            ROUNDING + 2 * count * self.spec.layers * saved_numbers(self.spec, saving, self.extra)
            for saving, count in ((Saving.RECOMPUTE, tokens), (Saving.KEEP, max(tokens, MOST_TOKENS)))
        )
        return max(min(self._memory() - self.workspace(tokens), most), least)

    def workspace(self, tokens: int) -> int:
        """Bytes that one layer's backward pass needs at its peak beside its input."""
        return workspace(self.spec, tokens, 2, self.dropout, self.float8)

    def _memory(self) -> int:
        if self.budget is None:
            # Holes in what torch holds are of no use to the arena or to a graph; weights that come in another dtype
            # leave more of them behind.
            torch.cuda.empty_cache()
            self.budget = available(self.device, holes=False) - RESERVE
        return self.budget

    def offloaded(self, tokens: int) -> int:
        """Layers, from the first on, whose inputs wait in the CPU's memory: as many as there is no other room for.

        0 where the CPU has no room for them either: the plan is then what it would be without it.
        """
        if self.forced not in (None, Saving.RECOMPUTE):
            return 0
        tokens, away = -(-tokens // STEP) * STEP, 0
        if self.offloads_all:
            away = self.spec.layers - 1
        elif self.device.type == "cuda":
            away = self._too_many(tokens)
        if not away:
            return 0
        if self.host_budget is None:
            self.host_budget = int(HOST_SHARE * free_memory())
        return away if 2 * tokens * self.spec.hidden * away <= self.host_budget else 0

    def _too_many(self, tokens: int) -> int:
        """The fewest layers without whose inputs a micro-batch fits, or all but the last."""
        spec, memory, work = self.spec, self._memory(), self.workspace(tokens)
        # every input, and in the reserve logits and what goes into the graphs and comes out (half of it is workspace)
        recomputed = ROUNDING + 2 * tokens * spec.hidden * (spec.layers + 2) + CHUNK_BYTES
        if recomputed + work <= memory + RESERVE - GAPS:
            return 0
        room = memory / (1 + SCATTERED) - work
        fitting = (away for away in range(1, spec.layers) if launched(spec, tokens, 2, away, self.extra) <= room)
        return next(fitting, spec.layers - 1)

    def plan(self, tokens: int) -> list[Saving]:
        """One choice a layer, the first layer first."""
        if isinstance(self.forced, list):
            return self.forced
        if away := self.offloaded(tokens):
            again = [Saving.RECOMPUTE] * (self.spec.layers - 1 - away)
            return [Saving.OFFLOAD] * away + again + [self.forced or Saving.KEEP]
        if self.forced is not None:
            return [self.forced] * self.spec.layers
        if self.device.type != "cuda":
            return [Saving.KEEP] * self.spec.layers
        return divide(self.spec, tokens, self.room(tokens) - ROUNDING, 2, self.extra)


def divide(spec: DecoderSpec, tokens: int, budget: int, size: int, extra: int = 0) -> list[Saving]:
    """Spend `budget` bytes on the layers: first all drop the gate-up product, then as many as fit keep it.

    Args:
        spec: Shapes.
        tokens: Of the micro-batch.
        budget: Bytes for saved activations.
        size: Bytes of a number.
        extra: Numbers a token of LoRA in each layer.

    Returns:
        One choice a layer. The last layer keeps all if one does: its activations are used up before any other's.
    """
    costs = {saving: saved_numbers(spec, saving, extra) * tokens * size for saving in Saving}
    choices = [Saving.RECOMPUTE] * (spec.layers - 1) + [Saving.KEEP]
    left = budget - costs[Saving.RECOMPUTE] * (spec.layers - 1) - costs[Saving.KEEP]
    if left < 0:
        return [Saving.RECOMPUTE] * spec.layers
    # A byte of attention-side activations saves less recomputation than one of gate-up (per Qwen3-8B layer and token:
    # 184 MFLOP for 29 KB against 201 for 49 KB), so all layers first climb to DROP_GATE_UP, then to KEEP.
    for lower, higher in ((Saving.RECOMPUTE, Saving.DROP_GATE_UP), (Saving.DROP_GATE_UP, Saving.KEEP)):
        step = costs[higher] - costs[lower]
        for index in reversed(range(spec.layers - 1)):
            if choices[index] is lower and left >= step:
                choices[index] = higher
                left -= step
    return choices


def saved_numbers(spec: DecoderSpec, saving: Saving, extra: int = 0) -> int:
    """Numbers a token that a layer keeps on the GPU; `extra` are those of LoRA where it keeps any of its insides."""
    attention = spec.heads.width + spec.heads.queries * spec.heads.size + spec.hidden + 2 * spec.heads.queries
    numbers = {
        Saving.OFFLOAD: 0,
        Saving.RECOMPUTE: spec.hidden,
        Saving.DROP_GATE_UP: spec.hidden + attention + extra,
        Saving.KEEP: spec.hidden + attention + extra + 2 * spec.intermediate,
    }
    return numbers[saving]


def workspace(spec: DecoderSpec, tokens: int, size: int, dropout: bool = False, float8: bool = False) -> int:
    """Bytes that one layer's backward pass needs at its peak beside its input.

    That is in the MLP or, where heads are many for the hidden size, in the attention of a recomputed layer; with it one
    16-bit weight, the gradient at the stack's output and the input of the layer below, on its way here.
    """
    queries, keys = spec.heads.queries * spec.heads.size, spec.heads.keys * spec.heads.size
    # what attention has made, its normed output, gate and up, their output's gradient, and the gradient from above
    mlp = spec.heads.width + queries + 2 * spec.heads.queries + 3 * spec.hidden + 3 * spec.intermediate
    mlp += spec.intermediate * dropout  # the down projection's input without what is dropped
    # q, k, v and attention's output as they are kept and as the kernel wants them; two gradients of hidden size, those
    # of attention's output and of q, k, v; within the kernel that of q in float32, of k and v for every query head
    attention = 2 * spec.heads.width + 3 * queries + (queries + keys) + 2 * spec.hidden + 4 * queries
    weight = 2 * spec.intermediate * spec.hidden
    work = weight * size + tokens * size * (max(mlp, attention) + 2 * spec.hidden)
    if float8:  # a byte a weight, and beside them the gradient of gate and up in 8 bit
        work += tokens * 2 * spec.intermediate - weight * (size - 1)
    return work


def launched(spec: DecoderSpec, tokens: int, size: int, away: int, extra: int = 0) -> int:
    """Bytes beside `workspace` that a micro-batch needs without graphs, nothing kept but inputs.

    The last layer may keep all: that is what `workspace` has for each layer, and they take it one after the other.

    Args:
        spec: Shapes.
        tokens: Of the micro-batch.
        size: Bytes of a number.
        away: Layers whose input is elsewhere.
        extra: Numbers a token of LoRA in each layer that keeps all: about an eighth of them stay in every layer.
    """
    return ROUNDING + tokens * size * ((spec.layers - away) * spec.hidden + spec.layers * (extra // 8))


def is_small(device: torch.device) -> bool:
    """A GPU of which this process may use less than `SMALL`."""
    return device.type == "cuda" and _cap(device, torch.cuda.mem_get_info(device)[1]) < SMALL


def _cap(device: torch.device, total: int) -> int:
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def available(device: torch.device, holes: bool = True) -> int:
    """Bytes that new tensors of this process may take, the cap of `set_per_process_memory_fraction` included.

    Args:
        device: A GPU.
        holes: Count what torch holds and no tensor lies in, which only tensors that fit into the gaps can have.
    """
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return min(free, _cap(device, total) - reserved) + (reserved - allocated if holes else 0)
