"""Where the fast engine's time goes on this GPU: kernels alone, whole micro-batches, waits, and a profile.

    python benchmarks/engine_probe.py [check] [pieces] [products] [ranks] [chunks]
                                      [whole] [sizes] [long] [waits] [profile] [--layers 36]

Random weights of Qwen3-8B's shape, NF4, LoRA r = 16 on all linear layers. One line of JSON a figure. docs/engine-log.md
keeps what came out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from unsloth_factory.config.settings import TuningSettings  # noqa: E402
from unsloth_factory.kernels import attention, nf4, rms_norm, rotary, swiglu  # noqa: E402
from unsloth_factory.kernels.transfer import to_device  # noqa: E402
from unsloth_factory.model.fast.head import cross_entropy_sum  # noqa: E402
from unsloth_factory.model.fast.layer import Saving  # noqa: E402
from unsloth_factory.model.fast.load import load_fast  # noqa: E402
from unsloth_factory.model.fast.quantize import quantize, stack  # noqa: E402
from unsloth_factory.model.lora import attach_lora  # noqa: E402

DEVICE, DTYPE = torch.device("cuda", 0), torch.bfloat16
VOCABULARY = 151_936
RECOMPUTE, LONG = Saving.RECOMPUTE, (4096, 8192, 16_384)
"""Of the probe that shows what it costs to keep layer inputs in the CPU's memory."""
MATRICES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (24576, 4096), "down": (4096, 12288)}


def say(**figures: Any) -> None:
    """One line of JSON."""
    print(json.dumps(figures), flush=True)


def config(layers: int) -> Any:
    """Qwen3-8B's shape with some number of layers."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None, eos_token_id=2,
    )  # fmt: skip


class RandomWeights:
    """Random tensors of the right shapes, made on the GPU."""

    device, dtype = DEVICE, DTYPE

    def __init__(self, shapes: Any) -> None:
        from transformers import Qwen3ForCausalLM

        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in Qwen3ForCausalLM(shapes).named_parameters()}

    def get(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """Ones for a norm, small normal numbers for a matrix."""
        shape = self.shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, device=device or DEVICE, dtype=DTYPE)
        return torch.randn(shape, device=device or DEVICE, dtype=DTYPE) * 0.02


def model(layers: int) -> Any:
    """The adapted model."""
    torch.manual_seed(0)
    shapes = config(layers)
    started = time.time()
    built = load_fast(RandomWeights(shapes), shapes, quantized=True)
    peft = attach_lora(built, TuningSettings(), 7)
    built.model.bind()
    say(what="loaded", seconds=round(time.time() - started, 1), gib=round(torch.cuda.memory_allocated() / 2**30, 2))
    return peft


def documents(tokens: int, mean: int = 900) -> list[int]:
    """Lengths of about `mean` that fill the tokens."""
    count = max(1, round(tokens / mean))
    return [tokens // count] * (count - 1) + [tokens - tokens // count * (count - 1)]


def timed(function: Callable[[], Any], repeat: int = 20) -> float:
    """Median milliseconds on the GPU."""
    for _ in range(3):
        function()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for start, stop in events:
        start.record()
        function()
        stop.record()
    torch.cuda.synchronize()
    return round(sorted(start.elapsed_time(stop) for start, stop in events)[repeat // 2], 4)


def pieces(tokens: int = 2048) -> None:
    """Each kernel alone, ms."""
    heads = rotary.Heads(32, 8, 128)
    x, w = torch.randn(tokens, 4096, device=DEVICE, dtype=DTYPE), torch.ones(4096, device=DEVICE, dtype=DTYPE)
    qkv = torch.randn(tokens, heads.width, device=DEVICE, dtype=DTYPE)
    angles = torch.randn(tokens, 64, device=DEVICE)
    norm = rotary.HeadNorm(w[:128], w[:128], 1e-6)
    gate_up = torch.randn(tokens, 24576, device=DEVICE, dtype=DTYPE)
    h = torch.randn(tokens, 12288, device=DEVICE, dtype=DTYPE)
    q, k = rotary.rotary(qkv, angles.cos(), angles.sin(), heads, norm)
    v = rotary.split(qkv, heads)[2]
    rows = attention.Documents.of(documents(tokens), DEVICE)
    attended = attention.attention(q, k, v, rows)
    dq = torch.randn_like(q)
    figures = {
        "rms_norm": timed(lambda: rms_norm.rms_norm(x, w, 1e-6)),
        "rms_norm_backward": timed(lambda: rms_norm.rms_norm_backward(x, x, w, 1e-6, residual=x)),
        "swiglu": timed(lambda: swiglu.swiglu(gate_up)),
        "swiglu_backward": timed(lambda: swiglu.swiglu_backward(h, gate_up)),
        "rotary": timed(lambda: rotary.rotary(qkv, angles, angles, heads, norm)),
        "rotary_backward": timed(lambda: rotary.rotary_backward((dq, k, k), qkv, angles, angles, heads, norm)),
        "attention": timed(lambda: attention.attention(q, k, v, rows)),
        "attention_backward": timed(lambda: attention.attention_backward(dq, q, k, v, attended, rows)),
    }
    say(what="pieces", tokens=tokens, **figures)
    for nf4.PROGRAM_BYTES in (512, 1024, 2048, 4096):
        for nf4.WARPS in (1, 2, 4, 8):
            figures = {name: _dequantize(*shape) for name, shape in MATRICES.items()}
            say(what="dequantize", bytes=nf4.PROGRAM_BYTES, warps=nf4.WARPS, **figures)
    nf4.PROGRAM_BYTES, nf4.WARPS = 1024, 2


def _dequantize(rows: int, columns: int) -> float:
    weight = torch.randn(rows, columns, device=DEVICE, dtype=DTYPE)
    packed, out = stack([quantize(weight)]), torch.empty_like(weight)
    graph = torch.cuda.CUDAGraph()
    nf4.launch(packed, out)
    with torch.cuda.graph(graph):
        for _ in range(10):
            nf4.launch(packed, out)
    return round(timed(graph.replay, 5) / 10, 4)


SHAPES = {
    "qwen3-8b": MATRICES,
    "qwen2-7b": {"qkv": (4608, 3584), "out": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "llama-3.1-8b": {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},
}
RANKS = {"qkv": 48, "out": 16, "gate_up": 32, "down": 16}


def chunks(tokens: int = 2560, parts: Sequence[int] = (1, 2, 3, 4, 6)) -> None:
    """Dequantising gate and up and the product with them, whole or in parts small enough to stay in the GPU's cache."""
    outputs, inputs = MATRICES["gate_up"]
    x, y = (torch.randn(tokens, width, device=DEVICE, dtype=DTYPE) for width in (inputs, outputs))
    graphs = {}
    for count in parts:
        rows = outputs // count
        pieces = [stack([quantize(torch.randn(rows, inputs, device=DEVICE, dtype=DTYPE))]) for _ in range(count)]
        room, graph = torch.empty(rows, inputs, device=DEVICE, dtype=DTYPE), torch.cuda.CUDAGraph()

        def run(pieces: Any = pieces, rows: int = rows, room: torch.Tensor = room) -> None:
            for number, piece in enumerate(pieces):
                nf4.launch(piece, room)
                torch.mm(x, room.t(), out=y[:, number * rows : (number + 1) * rows])

        run()
        with torch.cuda.graph(graph):
            for _ in range(20):
                run()
        graphs[count] = (graph, pieces, room)
    for _ in range(3):  # in turn: a GPU that is busy gets slower
        figures = {f"in {count}": round(50 * timed(graph.replay, 5)) for count, (graph, *_) in graphs.items()}
        say(what="chunks", tokens=tokens, us=figures)


def products(sizes: range = range(512, 4097, 128)) -> None:
    """A layer's base products by tokens of the micro-batch, microseconds: forwards and backwards of each matrix."""
    for model_name, matrices in SHAPES.items():
        widest = max(max(shape) for shape in matrices.values()) + 64
        rows = torch.randn(max(sizes), widest, device=DEVICE, dtype=DTYPE)
        for tokens in sizes:
            figures = {}
            for name, (outputs, inputs) in matrices.items():
                rank = RANKS[name]
                forwards = torch.randn(outputs, inputs + rank, device=DEVICE, dtype=DTYPE).t()
                backwards = torch.randn(outputs + rank, inputs, device=DEVICE, dtype=DTYPE)
                x, dy = (rows.flatten()[: tokens * n].view(tokens, n) for n in (inputs + rank, outputs + rank))
                pair = [timed(lambda x=x, w=w: torch.mm(x, w), 5) for x, w in ((x, forwards), (dy, backwards))]
                figures[name] = [round(1e3 * ms) for ms in pair]
            total = sum(map(sum, figures.values()))
            rate = 4 * tokens * sum(a * b for a, b in matrices.values()) / total / 1e6
            say(what="products", model=model_name, tokens=tokens, us=total, tflops=round(rate, 1), **figures)


def ranks(sizes: Sequence[int] = (1920, 2304, 2432, 2560)) -> None:
    """Whether rows of 4096 + 48 numbers make a product slower than rows of a multiple of 64; several times in turn."""
    matrices, rounds = SHAPES["qwen3-8b"], 3
    widest = max(max(shape) for shape in matrices.values()) + 64
    rows = torch.randn(max(sizes), widest, device=DEVICE, dtype=DTYPE)
    for tokens in sizes:
        found: dict[str, list[float]] = {"as they are": [], "multiples of 64": []}
        for _ in range(rounds):
            for which, rounded in zip(found, (8, 64), strict=True):
                total = 0.0
                for name, (outputs, inputs) in matrices.items():
                    rank = -(-RANKS[name] // rounded) * rounded
                    forwards = torch.randn(outputs, inputs + rank, device=DEVICE, dtype=DTYPE).t()
                    backwards = torch.randn(outputs + rank, inputs, device=DEVICE, dtype=DTYPE)
                    x, dy = (rows.flatten()[: tokens * n].view(tokens, n) for n in (inputs + rank, outputs + rank))
                    total += sum(timed(lambda x=x, w=w: torch.mm(x, w)) for x, w in ((x, forwards), (dy, backwards)))
                found[which].append(round(1e3 * total))
        say(what="ranks", tokens=tokens, us=found)


def check(layers: int = 4) -> None:
    """Graphs against single launches: hidden states and gradients of rows of several lengths."""
    peft = model(layers)
    decoder = peft.get_base_model().model
    parameters = [p for p in peft.parameters() if p.requires_grad]
    for p in parameters:
        p.data = torch.randn_like(p) * 0.02
    graphs = decoder.graphs
    for lengths in ([700, 324], [1500, 500], [100] * 13 + [37], [300], [1500, 500], [2048], [33, 900, 1100, 11]):
        ids = torch.randint(0, VOCABULARY, (1, sum(lengths)))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        weights = torch.randn(sum(lengths), 4096, device=DEVICE, dtype=DTYPE)
        found = []
        for decoder.graphs in (None, graphs):
            for p in parameters:
                p.grad = None
            for _ in range(2):  # gradients add up
                hidden = decoder(input_ids=ids, position_ids=positions).last_hidden_state[0]
                (hidden * weights).sum().backward()
            found.append([hidden.detach().float(), *(p.grad.clone() for p in parameters)])
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True)]
        say(what="graphs against launches", lengths=lengths[:4], hidden=errors[0], worst_gradient=max(errors[1:]))


class MicroBatch:
    """One micro-batch of documents, half of its tokens trained."""

    def __init__(self, peft: Any, tokens: int) -> None:
        self.inner = peft.get_base_model()
        lengths = documents(tokens)
        self.ids = torch.randint(0, VOCABULARY, (1, tokens))
        self.positions = torch.cat([torch.arange(n) for n in lengths])[None]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        self.index = torch.cat([torch.arange(a + n // 2, a + n) for a, n in zip(starts, lengths, strict=True)])
        self.targets = torch.randint(0, VOCABULARY, (len(self.index),))

    def hidden(self) -> torch.Tensor:
        """Normed hidden states [T, h]."""
        return self.inner.model(input_ids=self.ids, position_ids=self.positions).last_hidden_state[0]

    def loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        rows = hidden.index_select(0, to_device(self.index, DEVICE))
        total = cross_entropy_sum(rows, self.inner.lm_head.weight, to_device(self.targets, DEVICE))
        return total / len(self.index)

    def run(self) -> None:
        """Forward and backward pass."""
        self.loss(self.hidden()).backward()


def optimizer_of(peft: Any) -> Any:
    """AdamW 8 bit over the adapter."""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit([p for p in peft.parameters() if p.requires_grad], lr=1e-4)


def whole(peft: Any, tokens: int, saving: Saving) -> None:
    """Tokens a second of whole micro-batches; an optimizer step after every fourth."""
    decoder, optimizer = peft.get_base_model().model, optimizer_of(peft)
    decoder.planner.forced = saving
    decoder.give_up_memory()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = MicroBatch(peft, tokens)
    for turn in range(12):
        if turn == 4:
            torch.cuda.synchronize()
            started = time.time()
        batch.run()
        if turn % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    torch.cuda.synchronize()
    seconds = (time.time() - started) / 8
    memory = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
    gib = {name: round(count / 2**30, 2) for name, count in memory.items()}
    say(
        what="whole",
        saving=saving.value,
        tokens=tokens,
        ms=round(seconds * 1e3, 1),
        tok_s=round(tokens / seconds),
        **gib,
    )


def waits(peft: Any, tokens: int = 2048) -> None:
    """When Python comes back from each part of three micro-batches and an update: where it waits for the GPU."""
    batch, optimizer = MicroBatch(peft, tokens), optimizer_of(peft)
    peft.get_base_model().model.planner.forced = Saving.KEEP
    for turn in range(6):
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        for _ in range(3):
            hidden = batch.hidden()
            marks.append(time.perf_counter())
            loss = batch.loss(hidden)
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if turn >= 4:
            parts = [round(1e3 * (b - a), 2) for a, b in zip(marks, marks[1:], strict=False)]
            say(what="waits", parts=["hidden", "loss", "backward"] * 3 + ["update", "rest"], ms=parts)


def profile(peft: Any, tokens: int = 2048) -> None:
    """Kernels of one micro-batch by GPU time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    peft.get_base_model().model.planner.forced = Saving.KEEP
    batch = MicroBatch(peft, tokens)
    for _ in range(3):
        batch.run()
    with profiler(activities=[ProfilerActivity.CUDA]) as result:
        batch.run()
        torch.cuda.synchronize()
    rows = [(event.self_device_time_total / 1e3, event.count, event.key[:100]) for event in result.key_averages()]
    kernels = sorted((row for row in rows if row[0] and not row[2].startswith("_Replay")), reverse=True)
    total, count = sum(row[0] for row in kernels), sum(row[1] for row in kernels)
    say(what="profile", tokens=tokens, gpu_ms=round(total, 1), kernels=count)
    for ms, count, name in kernels[:32]:
        print(f"  {ms:8.2f} ms {count:5d} x {name}", flush=True)


def main() -> None:
    """Run the named parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["check", "pieces", "whole", "waits", "profile"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--cap", type=float, help="GiB of the card that this process may use")
    parser.add_argument("--launches", action="store_true", help="without CUDA graphs")
    given = parser.parse_args()
    if given.cap:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.cap * 2**30 / total)
    made: list[Any] = []

    def peft() -> Any:
        made[:] = made or [model(given.layers)]
        decoder = made[0].get_base_model().model
        if given.launches:
            decoder.graphs = None
        return made[0]

    known: dict[str, Callable[[], Any]] = {
        "check": check,
        "pieces": pieces,
        "whole": lambda: [whole(peft(), tokens, saving) for saving in Saving for tokens in (512, 1024, 2048, 4096)],
        "products": products,
        "ranks": ranks,
        "chunks": chunks,
        "sizes": lambda: [whole(peft(), tokens, Saving.KEEP) for tokens in range(1536, 3201, 128)],
        "long": lambda: [whole(peft(), tokens, saving) for tokens in LONG for saving in (RECOMPUTE, Saving.OFFLOAD)],
        "waits": lambda: waits(peft()),
        "profile": lambda: profile(peft()),
    }
    for name in given.parts:
        try:
            known[name]()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
