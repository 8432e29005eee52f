"""Which layers keep their activations, from the tokens of the micro-batch and the memory that is free."""

from __future__ import annotations

import torch

from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.spec import DecoderSpec

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
        self.arena: int | None = None
        """Bytes for activations, once their place has been allocated."""

    @property
    def recomputes_all(self) -> bool:
        """Every layer is recomputed, whatever memory there is."""
        return self.forced is Saving.RECOMPUTE

    def recompute_all(self) -> None:
        """From now on recompute every layer."""
        self.forced = Saving.RECOMPUTE

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
        if self.forced is not None:
            plan = self.plan(tokens)
            return ROUNDING + 2 * tokens * sum(saved_numbers(self.spec, saving, self.extra) for saving in plan)
        if self.arena is not None:
            return self.arena
        if self.budget is None:
            self.budget = available(self.device) - RESERVE
        least, most = (
            ROUNDING + 2 * count * self.spec.layers * saved_numbers(self.spec, saving, self.extra)
            for saving, count in ((Saving.RECOMPUTE, tokens), (Saving.KEEP, max(tokens, MOST_TOKENS)))
        )
        return max(min(self.budget - workspace(self.spec, tokens, 2), most), least)

    def plan(self, tokens: int) -> list[Saving]:
        """One choice a layer, the first layer first."""
        if isinstance(self.forced, list):
            return self.forced
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
        One choice a layer. The last layer always keeps all: its activations are used up before any other layer's.
    """
    costs = {saving: saved_numbers(spec, saving, extra) * tokens * size for saving in Saving}
    choices = [Saving.RECOMPUTE] * (spec.layers - 1) + [Saving.KEEP]
    left = budget - costs[Saving.RECOMPUTE] * (spec.layers - 1) - costs[Saving.KEEP]
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
    """Numbers a token that a layer keeps; `extra` are those of LoRA where the layer keeps any of its insides."""
    attention = spec.heads.width + spec.heads.queries * spec.heads.size + spec.hidden + 2 * spec.heads.queries
    numbers = {
        Saving.RECOMPUTE: spec.hidden,
        Saving.DROP_GATE_UP: spec.hidden + attention + extra,
        Saving.KEEP: spec.hidden + attention + extra + 2 * spec.intermediate,
    }
    return numbers[saving]


def workspace(spec: DecoderSpec, tokens: int, size: int) -> int:
    """Bytes that one layer's backward pass needs at its peak beside what is saved.

    That is in the MLP of a recomputed layer: its own activations once more, the gradient of SwiGLU's output and that
    output, four rows of hidden size, and one 16-bit weight.
    """
    weight = 2 * spec.intermediate * spec.hidden * size
    again = saved_numbers(spec, Saving.KEEP) - saved_numbers(spec, Saving.RECOMPUTE)
    return weight + tokens * size * (again + 2 * spec.intermediate + 4 * spec.hidden)


def is_small(device: torch.device) -> bool:
    """A GPU of which this process may use less than `SMALL`."""
    return device.type == "cuda" and _cap(device, torch.cuda.mem_get_info(device)[1]) < SMALL


def _cap(device: torch.device, total: int) -> int:
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def available(device: torch.device) -> int:
    """Bytes that new tensors of this process may take, the cap of `set_per_process_memory_fraction` included."""
    free, total = torch.cuda.mem_get_info(device)
    cap = _cap(device, total)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    return min(free, cap - reserved) + reserved - allocated
