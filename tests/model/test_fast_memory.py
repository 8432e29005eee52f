"""What both passes hold at once is what the planner counts, number by number.

Tensors of the `meta` device have sizes and no contents, so that a model of real width costs nothing; each kernel is
replaced by what it allocates on a GPU, FlashAttention-2 by its own workspace too.
"""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsloth_factory.kernels import attention, float8, nf4_float8, rms_norm, rotary, swiglu
from unsloth_factory.kernels.attention import Attended, Documents
from unsloth_factory.kernels.rotary import Heads
from unsloth_factory.model.fast import linear
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.decoder import FastDecoder
from unsloth_factory.model.fast.layer import Layer, Norms, Row, Saving
from unsloth_factory.model.fast.linear import FusedLinear, LoraPair, Part
from unsloth_factory.model.fast.offload import Away, HostInputs
from unsloth_factory.model.fast.planner import launched, workspace
from unsloth_factory.model.fast.spec import DecoderSpec

META, SIZE = torch.device("meta"), 2
TOKENS, LAYERS, RANK = 10_240, 6, 16
SHAPES = {"8B": (4096, 12288, 32), "4B": (2560, 9728, 32), "0.6B": (1024, 3072, 16)}


class Held(TorchDispatchMode):
    """Bytes of all tensors that were made within it and still live, and the most so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._see(tensor, new=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self._see(tensor, new=True)
        return result

    def _see(self, tensor: Any, new: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes() if new else 0
        self.now += self._sizes[storage._cdata]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata)

    def _gone(self, which: int) -> None:
        self.now -= self._sizes.pop(which)


@pytest.fixture(autouse=True)
def kernels_that_only_allocate(monkeypatch: pytest.MonkeyPatch) -> None:
    def rotated(qkv: torch.Tensor, cos: Any, sin: Any, heads: Heads, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(qkv.new_empty(len(qkv), count, heads.size) for count in (heads.queries, heads.keys))

    def attended(q: torch.Tensor, k: Any, v: Any, documents: Documents, out: torch.Tensor) -> Attended:
        made = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
        return Attended(out, made[1])

    def attention_gradients(
        dout: Any, q: Any, k: Any, v: Any, found: Attended, documents: Documents
    ) -> tuple[Any, ...]:
        out = found.out.contiguous()
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
        of_query, sums = torch.empty_like(q, dtype=torch.float32), torch.empty_like(found.lse)
        of_every_head = torch.empty_like(q), torch.empty_like(q)
        del out, of_query, sums, of_every_head
        return gradients

    def room(like: int) -> Any:
        return lambda *arguments, out=None, **options: torch.empty_like(arguments[like]) if out is None else out

    monkeypatch.setattr(
        rms_norm, "rms_norm", lambda x, weight, eps, out=None: torch.empty_like(x) if out is None else out
    )
    monkeypatch.setattr(rms_norm, "rms_norm_backward", room(1))
    monkeypatch.setattr(swiglu, "swiglu", lambda gate_up, out: out)
    monkeypatch.setattr(swiglu, "swiglu_backward", lambda dout, gate_up: dout)
    monkeypatch.setattr(rotary, "rotary", rotated)
    monkeypatch.setattr(rotary, "rotary_backward", lambda *arguments: None)
    monkeypatch.setattr(linear, "dropout", lambda x, rate, seed, stream: torch.empty_like(x))
    monkeypatch.setattr(linear, "add_dropout", lambda total, x, rate, seed, stream: total)
    monkeypatch.setattr(attention, "attention", attended)
    monkeypatch.setattr(attention, "attention_backward", attention_gradients)
    monkeypatch.setattr(HostInputs, "send", lambda self, x: Away(0, x.shape, x.dtype, self._micro_batch))
    monkeypatch.setattr(HostInputs, "_pieces", lambda self, away, x: [])


def fused(inputs: int, *outputs: int) -> FusedLinear:
    """Dense: what NF4 adds is one matrix in 16 bit, whatever the tokens."""
    parts, start = [], 0
    for number, rows in enumerate(outputs):
        parts.append(Part(str(number), start, start + rows))
        start += rows
    made = FusedLinear(torch.empty(start, inputs, dtype=torch.bfloat16, device=META), None, parts, torch.bfloat16)
    shapes = {part.name: ((RANK, inputs), (part.stop - part.start, RANK)) for part in parts}
    made.attach(
        {
            name: LoraPair(*(nn.Parameter(torch.empty(shape, device=META)) for shape in pair), 1.0)
            for name, pair in shapes.items()
        }
    )
    made.collect_in([torch.empty(size, device=META) for size in made.flat_sizes])
    return made


def stack(spec: DecoderSpec) -> Any:
    """As much of a `FastDecoder` as its two passes need."""
    queries, keys = spec.heads.queries * spec.heads.size, spec.heads.keys * spec.heads.size
    weight = torch.empty(spec.hidden, dtype=torch.bfloat16, device=META)
    layers = [
        Layer(
            spec, Norms(weight, weight, None), fused(spec.hidden, queries, keys, keys), fused(queries, spec.hidden),
            fused(spec.hidden, spec.intermediate, spec.intermediate), fused(spec.intermediate, spec.hidden),
        )
        for _ in range(LAYERS)
    ]  # fmt: skip
    decoder: Any = FastDecoder.__new__(FastDecoder)
    torch.nn.Module.__init__(decoder)
    decoder.stack, decoder.host_inputs, decoder.spec, decoder.first_trained = layers, HostInputs(META), spec, 0
    decoder.norm = decoder.embed_tokens = SimpleNamespace(weight=weight)
    return decoder


def in_float8(decoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of 8-bit factors, which only allocate."""
    for layer in decoder.stack:
        for projection in layer.projections.values():
            projection.float8 = (projection.weight, 1.0)

    def rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(len(x), 1, dtype=torch.float32)

    def matrix(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
        return weight.new_empty(weight.shape[::-1] if transposed else weight.shape, dtype=torch.float8_e4m3fn)

    def product(x: torch.Tensor, scales: Any, weight: torch.Tensor, factor: float, dtype: torch.dtype) -> torch.Tensor:
        return x.new_empty(len(x), len(weight), dtype=dtype)

    monkeypatch.setattr(float8, "quantize_rows", rows)
    monkeypatch.setattr(float8, "product", product)
    monkeypatch.setattr(nf4_float8, "dequantize", matrix)


def most(decoder: Any, spec: DecoderSpec, plan: list[Saving], dropped: bool) -> int:
    """Bytes at the fullest moment of both passes, the gradient at the stack's output included."""
    seed = torch.empty(1, dtype=torch.int64, device=META) if dropped else None
    row = Row(*torch.empty(2, 0, device=META), Documents((TOKENS,), torch.empty(2, device=META)), seed=seed)

    def hidden() -> torch.Tensor:
        return torch.empty(TOKENS, spec.hidden, dtype=torch.bfloat16, device=META)

    with torch.no_grad(), Held() as held:
        last, saved = decoder.forward_stack(hidden(), row, plan)
        handed, dhidden = [last], hidden()
        del last
        decoder.backward_stack(dhidden, handed.pop(), saved, row)
        return held.peak


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("away", [LAYERS - 1, 3, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fullest_moment_is_the_one_that_is_planned(shape: str, away: int, dropped: bool) -> None:
    hidden, intermediate, heads = SHAPES[shape]
    spec = DecoderSpec(
        "qwen3", LAYERS, hidden, intermediate, Heads(heads, 8, 128), 1, 1e-6, True, (False, False), False
    )
    plan = [Saving.OFFLOAD] * away + [Saving.RECOMPUTE] * (LAYERS - 1 - away) + [Saving.KEEP]
    extra = 2 * RANK * 7
    matrix = 2 * intermediate * hidden * SIZE
    planned = workspace(spec, TOKENS, SIZE, dropped) - matrix + launched(spec, TOKENS, SIZE, away, extra)
    found = most(stack(spec), spec, plan, dropped)
    # only where all inputs but one are away the one of the layer below comes while the fullest layer computes
    coming = 0 if away == LAYERS - 1 else TOKENS * hidden * SIZE
    assert found == pytest.approx(planned - coming, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_in_float8_are_planned_too(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, intermediate, heads = SHAPES[shape]
    spec = DecoderSpec(
        "qwen3", LAYERS, hidden, intermediate, Heads(heads, 8, 128), 1, 1e-6, True, (False, False), False
    )
    decoder = stack(spec)
    in_float8(decoder, monkeypatch)
    found = most(decoder, spec, [Saving.RECOMPUTE] * (LAYERS - 1) + [Saving.KEEP], False)
    planned = workspace(spec, TOKENS, SIZE, float8=True) + launched(spec, TOKENS, SIZE, 0, 2 * RANK * 7)
    assert 0.8 * planned < found <= planned


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tail_holds_no_more_than_is_allowed_for(shape: str) -> None:
    """Beside what it keeps for its backward pass, which lies in the arena."""
    hidden, intermediate, heads = SHAPES[shape]
    spec = DecoderSpec(
        "qwen3", LAYERS, hidden, intermediate, Heads(heads, 8, 128), 1, 1e-6, True, (False, False), False
    )
    decoder, positions = stack(spec), TOKENS // 2
    layer, arena = decoder.stack[-1], Arena(SIZE * positions * (8 * hidden + 4 * intermediate), torch.bfloat16, META)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.empty(*sizes, dtype=torch.bfloat16, device=META)

    x, wide, index = (
        numbers(TOKENS, hidden),
        layer.out.input(TOKENS),
        torch.zeros(positions, dtype=torch.int64, device=META),
    )
    dhidden = numbers(positions, hidden)
    with torch.no_grad(), Held() as held:
        out, kept = decoder.tail.forward(x, wide, index, arena)
        del out
        decoder.tail.backward(dhidden, kept)
        peak = held.peak
    assert arena.outside == 0
    matrix = 2 * intermediate * hidden
    found = peak / SIZE + matrix
    allowed = matrix + positions * (3 * intermediate + 4 * hidden)
    assert 0.4 * allowed < found <= allowed
