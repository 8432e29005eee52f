"""Peak memory of a training, by part: loading, the probe of the longest micro-batch, and two optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from unsloth_factory.config.settings import OptimizerType
from unsloth_factory.estimate.decoder import Decoder
from unsloth_factory.estimate.layers import NF4_BLOCK, Lasting, Layout, Rows, Weights
from unsloth_factory.estimate.rehearsal import Buffer, Memory, Part, Tape, Work
from unsloth_factory.model.shapes import LinearShape, ModelShape

LEAST_8BIT = 4096
"""bitsandbytes keeps the state of smaller parameters in float32."""
STATE_BLOCK, SCALE_BLOCK = 256, 256
# Per quantised matrix: two tables of values, an offset, and what they are rounded up to.
QUANTISATION_TABLES = 2560
HOPPER_WORKSPACE, WORKSPACE = 32 * 2**20, 8_519_680


@dataclass(frozen=True)
class Training:
    """What is to be estimated."""

    shape: ModelShape
    kind: Literal["lora", "full", "freeze"] = "lora"
    quantized: bool = True
    lora_rank: int = 16
    lora_target: str = "all"
    lora_dropout: bool = False
    freeze_last_n: int = 2
    optimizer: OptimizerType = "adamw"
    checkpointing: bool = True
    accumulates: bool = True
    """Several micro-batches in an optimizer step: gradients are there while activations are."""
    method: Literal["sft", "dpo"] = "sft"
    capability: tuple[int, int] = (8, 0)
    """Compute capability of the card."""
    engine: Literal["standard", "fast"] = "standard"
    low_memory: bool = False
    """Of the fast engine: every layer is recomputed, the embedding stays in the CPU's memory."""

    def layout(self) -> Layout:
        """Formats and trained parts."""
        layers = self.shape.layers
        frozen: Weights = "nf4" if self.quantized else "half"
        formats: list[Weights] = [frozen] * layers
        if self.kind == "full":
            formats = ["trained"] * layers
        elif self.kind == "freeze":
            formats[max(0, layers - self.freeze_last_n) :] = ["trained"] * min(layers, self.freeze_last_n)
        lora = self.kind == "lora"
        targets = self.shape.targets(self.lora_target) if lora else ()
        return Layout(
            shape=self.shape,
            layers=tuple(formats),
            ends_trained=self.kind == "full",
            lora_rank=self.lora_rank if lora else 0,
            lora_targets=frozenset(target.name for target in targets),
            lora_dropout=lora and self.lora_dropout,
            checkpointing=self.checkpointing,
            plain_attention=self.capability < (8, 0),
        )

    def trained_parameters(self) -> dict[str, int]:
        """Entries of every trained matrix and vector, by the names that the rehearsal uses, in the model's order."""
        layout = self.layout()
        sizes = {"embedding": self.shape.embedding} if layout.ends_trained else {}
        for index, weights in enumerate(layout.layers):
            for linear in self.shape.linears():
                name = f"layers.{index}.{linear.name}"
                if weights == "trained":
                    sizes[name] = linear.weights
                    if linear.bias:
                        sizes[name + ".bias"] = linear.out_features
                elif linear.name in layout.lora_targets:
                    sizes[name + ".A"] = linear.in_features * self.lora_rank
                    sizes[name + ".B"] = linear.out_features * self.lora_rank
            if weights == "trained":
                sizes |= dict.fromkeys((f"layers.{index}.input_norm", f"layers.{index}.post_norm"), self.shape.hidden)
                norms = (f"layers.{index}.q_norm", f"layers.{index}.k_norm") if self.shape.head_norms else ()
                sizes |= dict.fromkeys(norms, self.shape.head_dim)
        if layout.ends_trained:
            sizes |= {"final_norm": self.shape.hidden} | ({"head": self.shape.head} if self.shape.head else {})
        return sizes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the card, the CUDA context aside."""

    parts: dict[Part, int]
    """What is in use at the fullest moment."""
    reserved: int
    """What torch has taken from the card by then: max_memory_reserved."""
    trained: int
    """Trained parameters."""

    @property
    def allocated(self) -> int:
        """Bytes in use at the fullest moment: max_memory_allocated."""
        return sum(self.parts.values())

    @property
    def slack(self) -> int:
        """Reserved beyond the fullest moment: rounding, and gaps between tensors."""
        return self.reserved - self.allocated


class Rehearsal:
    """A training from loading to its second optimizer step, in sizes."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.layout = training.layout()
        self.memory = Memory()
        self.tape = Tape(self.memory)
        self.parameters = training.trained_parameters()
        self.lasting = Lasting(workspace=HOPPER_WORKSPACE if training.capability >= (9, 0) else WORKSPACE)
        self._held: list[Buffer] = []

    def estimate(self, rows: Rows) -> MemoryEstimate:
        """Peak with `rows` as the longest micro-batch."""
        self._load()
        self._allocate_state()
        self._allocate_gradients()
        self.memory.forget_peak()  # loading has its own peak, which stays in `reserved`
        self._micro_batch(rows)  # the probe before the first step
        self.lasting.gradients.clear()
        self._micro_batch(rows)
        self.lasting.gradients.clear()
        return MemoryEstimate(
            parts=self.memory.peak_parts,
            reserved=self.memory.allocator.reserved,
            trained=sum(self.parameters.values()),
        )

    def cost(self, rows: Rows) -> dict[str, Work]:
        """Cost of one micro-batch, by phase."""
        self._micro_batch(rows)
        return self.tape.work

    def _micro_batch(self, rows: Rows) -> None:
        window = self.training.shape.sliding_window
        if window is not None and rows.width >= window:
            rows = replace(rows, masked=True)
        Decoder(self.tape, self.layout, rows, self.lasting).run(reference_first=self.training.method == "dpo")

    def _hold(self, count: int, part: Part) -> None:
        self._held.append(Buffer(self.memory, count, part))

    # -- loading ------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """The order of transformers' loader: one large allocation to warm up, then tensors in the order of names."""
        shape = self.training.shape
        size = 4 if self.layout.ends_trained else 2
        ends: Part = "trained weights" if self.layout.ends_trained else "base weights"
        warm_up = Buffer(self.memory, int(self._stored_bytes()), "temporaries")
        del warm_up
        if shape.head:
            self._hold(size * shape.head, ends)
        self._hold(size * shape.embedding, ends)
        ordered = sorted(shape.linears(), key=lambda linear: _loading_order(linear.name))
        for weights in self.layout.layers:
            self._load_layer(ordered, weights)
        self._hold(size * shape.hidden, ends)
        for index, weights in enumerate(self.layout.layers):
            self._attach_lora(index, weights)

    def _stored_bytes(self) -> float:
        shape = self.training.shape
        size = 4 if self.layout.ends_trained else 2
        matrices = 0.5 if self.training.quantized else size
        rest = shape.embedding + shape.head + shape.hidden + shape.layers * shape.layer_vectors
        return shape.layers * shape.layer_weights * matrices + rest * size

    def _load_layer(self, linears: Sequence[LinearShape], weights: Weights) -> None:
        shape = self.training.shape
        for linear in linears:
            if weights == "nf4":
                self._quantise(linear.weights)
            elif weights == "trained" and not self.layout.ends_trained:
                half = Buffer(self.memory, 2 * linear.weights, "temporaries")
                self._hold(4 * linear.weights, "trained weights")
                del half
            else:
                size, part = (4, "trained weights") if weights == "trained" else (2, "base weights")
                self._hold(size * linear.weights, part)  # type: ignore[arg-type]
        part = "trained weights" if weights == "trained" else "base weights"
        self._hold((4 if weights == "trained" else 2) * shape.layer_vectors, part)  # type: ignore[arg-type]

    def _quantise(self, weights: int) -> None:
        """The 16-bit matrix is there until its packed form is."""
        stored = self.training.shape.prequantized
        half = None if stored else Buffer(self.memory, 2 * weights, "temporaries")
        blocks = -(-weights // NF4_BLOCK)
        scales = None if stored else Buffer(self.memory, 4 * blocks, "temporaries")
        self._hold(weights // 2, "base weights")
        centred = None if stored else Buffer(self.memory, 4 * blocks, "temporaries")
        self._hold(4 * -(-blocks // SCALE_BLOCK), "quantisation state")
        self._hold(blocks, "quantisation state")
        self._hold(QUANTISATION_TABLES, "quantisation state")
        del half, scales, centred

    def _attach_lora(self, index: int, weights: Weights) -> None:
        if weights == "trained":
            return
        for linear in self.training.shape.linears():
            name = f"layers.{index}.{linear.name}"
            for end in (".A", ".B"):
                if name + end in self.parameters:
                    self._hold(4 * self.parameters[name + end], "trained weights")

    # -- optimizer ----------------------------------------------------------------------------------------------

    def _allocate_state(self) -> None:
        """Two moments of every trained parameter; paged ones lie in memory that torch does not count."""
        kind = self.training.optimizer
        for count in self.parameters.values():
            if kind == "paged_adamw_8bit" and count >= 1e5:
                continue
            small = kind == "adamw" or count < LEAST_8BIT
            for _ in range(2):
                self._hold((4 if small else 1) * count, "optimizer state")
            if not small:
                for _ in range(2):
                    self._hold(4 * -(-count // STATE_BLOCK), "optimizer state")

    def _allocate_gradients(self) -> None:
        """The probe puts zeros where an earlier micro-batch would have left gradients."""
        if self.training.accumulates:
            for name, count in self.parameters.items():
                self.lasting.gradients[name] = Buffer(self.memory, 4 * count, "gradients")


def micro_batch_cost(training: Training, rows: Rows) -> dict[str, Work]:
    """Cost of one micro-batch, by phase. Layers of a kind cost the same, so that few of them are rehearsed."""
    few = training.freeze_last_n + 1 if training.kind == "freeze" else 1
    more = training.shape.layers - few
    small, larger = (Rehearsal(_with_layers(training, few + extra)).cost(rows) for extra in (0, 1))
    return {phase: work.plus(larger[phase], more) for phase, work in small.items()}


def _with_layers(training: Training, layers: int) -> Training:
    return replace(training, shape=replace(training.shape, layers=layers))


def _loading_order(name: str) -> str:
    """Parts of a layer are loaded in the order of their full names."""
    return ("mlp." if name in ("gate_proj", "up_proj", "down_proj") else "self_attn.") + name
