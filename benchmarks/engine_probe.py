"""Where the fast engine's time goes on this GPU: pieces alone, whole micro-batches, and a profile.

    python benchmarks/engine_probe.py all [--layers 36]

Random weights of Qwen3-8B's shape, NF4, LoRA r = 16 on all linear layers. One line of JSON a figure.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
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


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def config(layers: int) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip


class RandomWeights:
    """Random tensors of the right shapes, made on the GPU."""

    device, dtype = DEVICE, DTYPE

    def __init__(self, shapes: Any) -> None:
        from transformers import Qwen3ForCausalLM

        with torch.device("meta"):
            self.shapes = {name: p.shape for name, p in Qwen3ForCausalLM(shapes).named_parameters()}

    def get(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        return (
            torch.ones(shape, device=DEVICE, dtype=DTYPE)
            if len(shape) == 1
            else torch.randn(shape, device=DEVICE, dtype=DTYPE) * 0.02
        )


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
    return sorted(start.elapsed_time(stop) for start, stop in events)[repeat // 2]


def documents(tokens: int, mean: int = 900) -> list[int]:
    count = max(1, round(tokens / mean))
    return [tokens // count] * (count - 1) + [tokens - tokens // count * (count - 1)]


def pieces(tokens: int) -> None:
    """Each kernel alone, ms a layer."""
    heads = rotary.Heads(32, 8, 128)
    x, w = torch.randn(tokens, 4096, device=DEVICE, dtype=DTYPE), torch.ones(4096, device=DEVICE, dtype=DTYPE)
    qkv = torch.randn(tokens, heads.width, device=DEVICE, dtype=DTYPE)
    angles = torch.randn(tokens, 64, device=DEVICE)
    norm = rotary.HeadNorm(w[:128], w[:128], 1e-6)
    gate_up = torch.randn(tokens, 24576, device=DEVICE, dtype=DTYPE)
    h = torch.randn(tokens, 12288, device=DEVICE, dtype=DTYPE)
    q, k = rotary.rotary(qkv, angles.cos(), angles.sin(), heads, norm)
    v = rotary.split(qkv, heads)[2]
    docs = attention.Documents.of(documents(tokens), DEVICE)
    att = attention.attention(q, k, v, docs)
    dq = torch.randn_like(q)
    figures = {
        "rms_norm": timed(lambda: rms_norm.rms_norm(x, w, 1e-6)),
        "rms_norm_backward": timed(lambda: rms_norm.rms_norm_backward(x, x, w, 1e-6, x)),
        "swiglu": timed(lambda: swiglu.swiglu(gate_up)),
        "swiglu_backward": timed(lambda: swiglu.swiglu_backward(h, gate_up)),
        "rotary": timed(lambda: rotary.rotary(qkv, angles, angles, heads, norm)),
        "rotary_backward": timed(lambda: rotary.rotary_backward((dq, k, k), qkv, angles, angles, heads, norm)),
        "attention": timed(lambda: attention.attention(q, k, v, docs)),
        "attention_backward": timed(lambda: attention.attention_backward(dq, q, k, v, att, docs)),
    }
    say(what="pieces", tokens=tokens, **{name: round(ms, 4) for name, ms in figures.items()})
    try:
        qc, kc, vc = (t.unsqueeze(0).transpose(1, 2) for t in (q, k, v.contiguous()))
        kr, vr = (t.repeat_interleave(4, 1) for t in (kc, vc))
        fwd = torch.ops.aten._scaled_dot_product_cudnn_attention
        out = fwd(qc, kr, vr, None, True, 0.0, True, False)
        say(
            what="cudnn one document",
            tokens=tokens,
            ms=round(timed(lambda: fwd(qc, kr, vr, None, True, 0.0, True, False)), 4),
            gqa=round(timed(lambda: fwd(qc, kc, vc, None, True, 0.0, True, False)), 4),
        )
        del out
    except Exception as error:
        say(what="cudnn one document", error=repr(error)[:300])


def cudnn() -> None:
    """CuDNN's attention over packed documents, against the flash kernel of torch."""
    import subprocess

    done = subprocess.run([sys.executable, __file__, "--cudnn"], capture_output=True, text=True, timeout=60)
    print(done.stdout, done.stderr[-800:], flush=True)


def cudnn_probe() -> None:
    aten = torch.ops.aten
    for lengths in ([1024, 1024], [900, 300, 700, 148], [2048]):
        tokens = sum(lengths)
        q = torch.randn(tokens, 32, 128, device=DEVICE, dtype=DTYPE)
        k, v = (torch.randn(tokens, 8, 128, device=DEVICE, dtype=DTYPE) for _ in range(2))
        docs = attention.Documents.of(lengths, DEVICE)
        att = attention.attention(q, k, v, docs)
        dq = torch.randn_like(q)
        flash = attention.attention_backward(dq, q, k, v, att, docs)
        b, m, scale = docs.borders, docs.longest, 1 / math.sqrt(128)
        say(
            what="flash",
            lengths=lengths,
            forward=round(timed(lambda: attention.attention(q, k, v, docs)), 4),
            backward=round(timed(lambda: attention.attention_backward(dq, q, k, v, att, docs)), 4),
        )
        try:
            run = lambda: aten._cudnn_attention_forward(q, k, v, None, b, b, m, m, True, 0.0, True, False, scale=scale)  # noqa: E731
            out = run()
            error = ((out[0].view_as(att.out) - att.out).float().norm() / att.out.float().norm()).item()
            back = lambda: aten._cudnn_attention_backward(
                dq, q, k, v, out[0], out[1], out[6], out[7], None, b, b, m, m, 0.0, True, scale=scale
            )  # noqa: E731
            grads = back()
            errors = [
                ((x.view_as(y) - y).float().norm() / y.float().norm()).item() for x, y in zip(grads, flash, strict=True)
            ]
            say(
                what="cudnn",
                lengths=lengths,
                forward=round(timed(run), 4),
                backward=round(timed(back), 4),
                error=error,
                errors=errors,
            )
        except Exception as error:
            say(what="cudnn", lengths=lengths, error=repr(error)[:400])


def products(tokens: int) -> None:
    """LoRA's share of a fused projection: as it is, and folded into one longer product."""
    for name, (n, k, parts) in {
        "qkv": (6144, 4096, 3),
        "out": (4096, 4096, 1),
        "gate_up": (24576, 4096, 2),
        "down": (4096, 12288, 1),
    }.items():
        r = 16 * parts
        x = torch.randn(tokens, k, device=DEVICE, dtype=DTYPE)
        w = torch.randn(n, k, device=DEVICE, dtype=DTYPE)
        a, b = torch.randn(r, k, device=DEVICE, dtype=DTYPE), torch.randn(n, 16, device=DEVICE, dtype=DTYPE)
        dy = torch.randn(tokens, n, device=DEVICE, dtype=DTYPE)
        xa, wa = (
            torch.randn(tokens, k + r, device=DEVICE, dtype=DTYPE),
            torch.randn(n, k + r, device=DEVICE, dtype=DTYPE),
        )
        dya, wb = (
            torch.randn(tokens, n + r, device=DEVICE, dtype=DTYPE),
            torch.randn(n + r, k, device=DEVICE, dtype=DTYPE),
        )
        t = x @ a.t()
        y = x @ w.t()
        y0 = y[:, : n // parts]
        packed = stack([quantize(w)])
        out = torch.empty(n, k, device=DEVICE, dtype=DTYPE)
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        say(
            what="products",
            name=name,
            tokens=tokens,
            base=round(timed(lambda: x @ w.t()), 4),
            augmented=round(timed(lambda: xa @ wa.t()), 4),
            down_a=round(timed(lambda: x @ a.t()), 4),
            up_b_all_parts=round(parts * timed(lambda: y0.addmm_(t[:, :16], b[: n // parts].t())), 4),
            base_back=round(timed(lambda: dy @ w), 4),
            augmented_back=round(timed(lambda: dya @ wb), 4),
            dt=round(parts * timed(lambda: dy[:, : n // parts] @ b[: n // parts]), 4),
            dx_add=round(timed(lambda: x.addmm_(t, a)), 4),
            da=round(timed(lambda: t.t() @ x), 4),
            db=round(parts * timed(lambda: dy[:, : n // parts].t() @ t[:, :16]), 4),
            dequantize=round(timed(lambda: nf4.launch(packed, out)), 4),
            bnb=round(timed(lambda: dequantize_4bit(codes, state)), 4),
        )


def dequantize_settings() -> None:
    """Bytes a program and warps of the dequantisation, against memory speed."""
    w = torch.randn(24576, 4096, device=DEVICE, dtype=DTYPE)
    packed, out = stack([quantize(w[:12288]), quantize(w[12288:])]), torch.empty_like(w)
    total = packed.codes.numel()
    for size in (512, 1024, 2048, 4096):
        for warps in (2, 4, 8):

            def run(size: int = size, warps: int = warps) -> None:
                nf4._kernel[(-(-total // size),)](
                    packed.codes,
                    packed.absmax,
                    packed.scales,
                    packed.offsets,
                    packed.starts,
                    packed.scale_starts,
                    packed.code,
                    packed.absmax_code,
                    out,
                    total,
                    4096,
                    4096,
                    PARTS=2,
                    BYTES=size,
                    num_warps=warps,
                )

            ms = timed(run)
            say(
                what="dequantize",
                bytes=size,
                warps=warps,
                ms=round(ms, 4),
                tb_s=round((total * 5 + total / 32) / ms / 1e9, 2),
            )


def model(layers: int) -> Any:
    torch.manual_seed(0)
    shapes = config(layers)
    started = time.time()
    built = load_fast(RandomWeights(shapes), shapes, quantized=True)
    peft = attach_lora(built, TuningSettings(), 7)
    built.model.bind()
    say(what="loaded", seconds=round(time.time() - started, 1), gib=round(torch.cuda.memory_allocated() / 2**30, 2))
    return peft


def step(peft: Any, tokens: int) -> Callable[[], torch.Tensor]:
    """One micro-batch: half of the tokens trained."""
    inner = peft.get_base_model()
    lengths = documents(tokens)
    ids = torch.randint(0, 151000, (1, tokens))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index = torch.cat([torch.arange(n // 2, n) for n in lengths])
    index = torch.cat(
        [
            torch.arange(s + n // 2, s + n)
            for s, n in zip([sum(lengths[:i]) for i in range(len(lengths))], lengths, strict=True)
        ]
    ).to(DEVICE)
    targets = torch.randint(0, 151000, (len(index),), device=DEVICE)

    def run() -> torch.Tensor:
        hidden = inner.model(input_ids=ids, position_ids=positions).last_hidden_state[0]
        loss = cross_entropy_sum(hidden.index_select(0, index), inner.lm_head.weight, targets)
        (loss / len(index)).backward()
        return loss

    return run


def whole(peft: Any, sizes: list[int]) -> None:
    """Tokens a second of whole micro-batches; an optimizer step after every second."""
    import bitsandbytes as bnb

    params = [p for p in peft.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(params, lr=1e-4)
    planner = peft.get_base_model().model.planner
    decoder = peft.get_base_model().model
    for saving in (Saving.KEEP, Saving.DROP_GATE_UP, Saving.RECOMPUTE):
        planner.forced = saving
        if decoder.graphs is not None:
            decoder.graphs.drop()
        for tokens in sizes:
            try:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                run = step(peft, tokens)
                for _ in range(3):
                    run()
                optimizer.step()
                optimizer.zero_grad()
                torch.cuda.synchronize()
                started = time.time()
                for turn in range(8):
                    run()
                    if turn % 4 == 3:
                        optimizer.step()
                        optimizer.zero_grad()
                issued = time.time() - started
                torch.cuda.synchronize()
                seconds = (time.time() - started) / 8
                say(
                    what="whole",
                    saving=saving.value,
                    tokens=tokens,
                    ms=round(seconds * 1e3, 1),
                    cpu_ms=round(issued / 8 * 1e3, 1),
                    tok_s=round(tokens / seconds),
                    peak=round(torch.cuda.max_memory_allocated() / 2**30, 2),
                    reserved=round(torch.cuda.max_memory_reserved() / 2**30, 2),
                )
            except torch.OutOfMemoryError as error:
                say(what="whole", saving=saving.value, tokens=tokens, error=str(error)[:120])


def mix(count: int, mean: float, low: int, high: int, seed: int = 3407) -> list[int]:
    """Sample lengths: log-normal, mean 900 with median 700 (or the same spread around another mean), clipped."""
    import random

    chooser = random.Random(seed)
    sigma = math.sqrt(2 * math.log(900 / 700))
    return [
        min(high, max(low, round(chooser.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma))))
        for _ in range(count)
    ]


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Longest first into the first micro-batch with room."""
    bins: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        place = next((b for b in bins if sum(b) + length <= budget), None)
        if place is None:
            bins.append([length])
        else:
            place.append(length)
    return bins


def stream(peft: Any, name: str, lengths: list[int], budget: int, per_step: int = 32) -> None:
    """Real tokens a second over optimizer steps of `per_step` samples."""
    import bitsandbytes as bnb

    inner = peft.get_base_model()
    inner.model.planner.forced = None
    optimizer = bnb.optim.AdamW8bit([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
    steps = [lengths[i : i + per_step] for i in range(0, len(lengths) - per_step + 1, per_step)]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    rates, done, kept = [], 0, []
    for number, step_lengths in enumerate(steps):
        torch.cuda.synchronize()
        started = time.time()
        for lengths_here in micro_batches(step_lengths, budget):
            total = sum(lengths_here)
            ids = torch.randint(0, 151000, (1, total))
            positions = torch.cat([torch.arange(n) for n in lengths_here])[None]
            offsets = [sum(lengths_here[:i]) for i in range(len(lengths_here))]
            index = torch.cat([torch.arange(o + n // 2, o + n) for o, n in zip(offsets, lengths_here, strict=True)]).to(
                DEVICE
            )
            targets = torch.randint(0, 151000, (len(index),)).to(DEVICE)
            hidden = inner.model(input_ids=ids, position_ids=positions).last_hidden_state[0]
            (cross_entropy_sum(hidden.index_select(0, index), inner.lm_head.weight, targets) / 1e4).backward()
            done += 1
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        rates.append(sum(step_lengths) / (time.time() - started))
        kept.append(len(micro_batches(step_lengths, budget)))
    rates = sorted(rates[2:])
    say(
        what="mix",
        name=name,
        budget=budget,
        tok_s=round(rates[len(rates) // 2]),
        slowest=round(rates[0]),
        fastest=round(rates[-1]),
        micro_batches=sum(kept) / len(kept),
        peak=round(torch.cuda.max_memory_allocated() / 2**30, 2),
        reserved=round(torch.cuda.max_memory_reserved() / 2**30, 2),
    )


def check() -> None:
    """Graphs against single launches: hidden states and gradients, on rows of several lengths; four layers."""
    from unsloth_factory.model.fast.graphs import Graphs

    peft = model(4)
    decoder = peft.get_base_model().model
    params = [p for p in peft.parameters() if p.requires_grad]
    for p in params:
        p.data = torch.randn_like(p) * 0.02
    for lengths in ([700, 324], [1500, 500], [100] * 13 + [37], [300], [1500, 500], [2048], [33, 900, 1100, 11]):
        total = sum(lengths)
        ids = torch.randint(0, 151000, (1, total))
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        weights = torch.randn(total, 4096, device=DEVICE, dtype=DTYPE)
        found = []
        for graphs in (None, decoder.graphs or Graphs(decoder)):
            decoder.graphs = graphs
            for p in params:
                p.grad = None
            for _ in range(2):  # gradients add up
                hidden = decoder(input_ids=ids, position_ids=positions).last_hidden_state[0]
                (hidden * weights).sum().backward()
            found.append([hidden.detach().float(), *(p.grad.clone() for p in params)])
        worst = max(float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True))
        say(
            what="graphs against launches",
            lengths=lengths[:4],
            hidden=float((found[1][0] - found[0][0]).norm() / found[0][0].norm()),
            worst=worst,
        )


def waits(peft: Any, tokens: int = 2048) -> None:
    """When Python comes back from each part of a micro-batch: where it waits for the GPU."""
    import bitsandbytes as bnb

    inner = peft.get_base_model()
    inner.model.planner.forced = Saving.KEEP
    optimizer = bnb.optim.AdamW8bit([p for p in peft.parameters() if p.requires_grad], lr=1e-4)
    lengths = documents(tokens)
    ids = torch.randint(0, 151000, (1, tokens))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    index, targets = torch.arange(tokens // 2), torch.randint(0, 151000, (tokens // 2,))
    for turn in range(6):
        torch.cuda.synchronize()
        marks = [time.perf_counter()]
        for _ in range(3):
            hidden = inner.model(input_ids=ids, position_ids=positions).last_hidden_state[0]
            marks.append(time.perf_counter())
            rows = hidden.index_select(0, to_device(index, DEVICE))
            loss = cross_entropy_sum(rows, inner.lm_head.weight, to_device(targets, DEVICE))
            marks.append(time.perf_counter())
            (loss / 1e4).backward()
            marks.append(time.perf_counter())
        optimizer.step()
        marks.append(time.perf_counter())
        optimizer.zero_grad()
        marks.append(time.perf_counter())
        torch.cuda.synchronize()
        marks.append(time.perf_counter())
        if turn >= 4:
            say(what="waits", ms=[round(1e3 * (b - a), 2) for a, b in zip(marks, marks[1:], strict=False)])


def profile(peft: Any, tokens: int) -> None:
    """Kernels of one micro-batch by GPU time."""
    planner = peft.get_base_model().model.planner
    planner.forced = Saving.KEEP
    run = step(peft, tokens)
    for _ in range(3):
        run()
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as result:
        run()
        torch.cuda.synchronize()
    rows = [
        (e.self_device_time_total / 1e3, e.count, e.key[:100])
        for e in result.key_averages()
        if e.self_device_time_total
    ]
    kernels = [row for row in rows if not row[2].startswith(("aten::", "bitsandbytes", "_Stack", "_HeadLoss"))]
    say(
        what="profile",
        tokens=tokens,
        gpu_ms=round(sum(row[0] for row in kernels), 1),
        launches=sum(row[1] for row in kernels),
    )
    for ms, count, name in sorted(kernels, reverse=True)[:32]:
        print(f"  {ms:8.2f} ms {count:5d} x {name}", flush=True)


def capped(gib: float) -> None:
    """Let the process use no more of the card."""
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(0).total_memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["pieces", "whole", "profile", "mix"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--cudnn", action="store_true")
    parser.add_argument("--cap", type=float, default=0.0)
    parser.add_argument("--no_graphs", action="store_true")
    parser.add_argument("--budgets", default="2048,2304,2560")
    arguments = parser.parse_args()
    if arguments.cudnn:
        return cudnn_probe()
    if arguments.cap:
        capped(arguments.cap)
    import traceback

    from unsloth_factory.model.fast.graphs import Graphs

    state: dict[str, Any] = {}

    def peft() -> Any:
        if "peft" not in state:
            state["peft"] = model(arguments.layers)
        decoder = state["peft"].get_base_model().model
        decoder.graphs = None if arguments.no_graphs else Graphs(decoder)
        decoder.planner.budget = None
        return state["peft"]

    long, short = mix(384, 900, 64, 4096), mix(512, 200, 16, 1024)
    budgets = [int(word) for word in arguments.budgets.split(",")]
    known: dict[str, Callable[[], Any]] = {
        "pieces": lambda: pieces(2048),
        "cudnn": cudnn,
        "check": check,
        "waits": lambda: waits(peft()),
        "whole": lambda: whole(peft(), [512, 1024, 2048, 4096]),
        "profile": lambda: profile(peft(), 2048),
        "mix": lambda: [stream(peft(), "mean900", long, budget) for budget in budgets],
        "short": lambda: [stream(peft(), "mean200", short, budget) for budget in budgets[:1]],
    }
    for name in arguments.parts:
        try:
            known[name]()
        except Exception:
            traceback.print_exc()


if __name__ == "__main__":
    main()
