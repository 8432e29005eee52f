"""The real allocator runs out at random points of trainings on a GPU; every run ends as if it had not.

    python benchmarks/out_of_memory.py make /tmp/model       # random weights, 0.9 GB
    python benchmarks/out_of_memory.py run  /tmp/model 50    # 50 points, one line of JSON each, then a summary
    python benchmarks/out_of_memory.py dry                   # the same on the CPU, tiny, with a fake allocator

The model has Qwen3-1.7B's shape but three layers, so that 80 trainings take two minutes. What the process may use of
the card (`set_per_process_memory_fraction`) shrinks: before the start, where the probe meets it; at a random
micro-batch; or at a random one of an evaluation, until it is over. How far is random as well, between what the job
needs with every lever pulled and nine tenths of what it takes undisturbed. How samples are batched changes the loss by
rounding: how much, is measured by undisturbed runs in other micro-batches, and four times that is the limit (or
`LEAST`, if that is more). The first half of the points is in bfloat16, the second in float32 (no TF32).
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "torture")]

from fake_card import FakeCard, FakeMeter  # noqa: E402
from rich.console import Console  # noqa: E402

from unsloth_factory.config.settings import (  # noqa: E402
    LoopSettings,
    ModelSettings,
    RunSettings,
    TuningSettings,
    WatchSettings,
)
from unsloth_factory.data.template import ChatTemplate  # noqa: E402
from unsloth_factory.data.types import TokenPair, TokenSample  # noqa: E402
from unsloth_factory.model.load import load_model  # noqa: E402
from unsloth_factory.run.folder import RunFolder, RunManifest  # noqa: E402
from unsloth_factory.training import loop as loop_module  # noqa: E402
from unsloth_factory.training import session as session_module  # noqa: E402
from unsloth_factory.training import step as step_module  # noqa: E402
from unsloth_factory.training.checkpoints.store import claim  # noqa: E402
from unsloth_factory.training.job import TrainingJob  # noqa: E402
from unsloth_factory.training.memory.levers import Levers  # noqa: E402
from unsloth_factory.training.memory.meter import GpuMeter  # noqa: E402
from unsloth_factory.training.methods import Dpo, Sft  # noqa: E402

STEPS, BATCH, ACCUMULATION = 4, 4, 2
TINY = TuningSettings(lora_r=4)
JOBS: dict[str, dict[str, Any]] = {
    "sft packed": {"no_gradient_checkpointing": True},
    "dpo packed": {"no_gradient_checkpointing": True},
    "sft padded, recomputed": {"no_packing": True},
}
KINDS = ("from the start", "later", "later", "in the evaluation")
UPDATE, STATE = step_module._update, session_module.LoopState
GIB = 2**30
LEAST = {torch.bfloat16: 3e-4, torch.float32: 1e-5}
"""Relative difference of a loss that is rounding whatever was measured."""


@dataclass
class Bench:
    """One model in memory, and the fake card of a dry run."""

    loaded: Any
    folder: Path
    lengths: tuple[int, int]
    card: FakeCard | None = None
    start: list[torch.Tensor] = field(default_factory=list)
    calls: int = 0
    on_call: Callable[[int, bool], None] | None = None
    """Told the number of each loss that is computed, and whether it is one of an evaluation."""

    def cap(self, limit: int | None) -> None:
        """Let the process use no more than that from now on."""
        if self.card is not None:
            self.card.limit = limit or 2**60
            return
        torch.cuda.empty_cache()
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (limit or total) / total))

    def failures(self) -> int:
        """Allocations that were refused so far."""
        return self.card.failures if self.card is not None else torch.cuda.memory_stats()["num_ooms"]

    def peak(self) -> int:
        """Most that was in use: allocated, because what is cached besides is given back when it is needed."""
        return self.card.peak if self.card is not None else torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        """Let the peak count from now on."""
        if self.card is not None:
            self.card.peak = self.card.used
        else:
            torch.cuda.reset_peak_memory_stats()


def make(folder: Path, hidden: int = 2048, layers: int = 3, vocabulary: int = 151936) -> dict[str, Any]:
    """Random weights of Qwen3-1.7B's shape cut to three layers (or a tiny one), with the bundled tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    started = time.time()
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 256), head_dim=128,
        max_position_embeddings=40960, tie_word_embeddings=True, bos_token_id=None, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )  # fmt: skip
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    for path in (ROOT / "unsloth_factory" / "assets" / "tiny_model").iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, folder)
    return {"what": "make", "seconds": round(time.time() - started, 1)}


def rows(count: int, seed: int, lengths: tuple[int, int]) -> list[TokenSample]:
    """Random rows whose lengths spread over the range, long ones rare; half of each is trained."""
    chooser = np.random.default_rng(seed)
    shortest, longest = lengths
    made = []
    for number in range(count):
        length = int(shortest * (longest / shortest) ** chooser.random())
        ids = chooser.integers(5, 600, length).astype(np.int32)
        made.append(TokenSample(ids, np.arange(length) >= length // 2, f"rows.jsonl:{number + 1}"))
    return made


def pairs(count: int, seed: int, lengths: tuple[int, int]) -> list[TokenPair]:
    """Two such rows that share their first half."""
    made = []
    for one, other in zip(rows(count, seed, lengths), rows(count, seed + 1, lengths), strict=True):
        ids = other.ids.copy()
        shared = min(len(one.ids), len(ids)) // 2
        ids[:shared] = one.ids[:shared]
        trained = np.arange(len(ids)) >= shared
        made.append(TokenPair(TokenSample(one.ids, np.arange(len(one.ids)) >= shared, one.source),
                              TokenSample(ids, trained, one.source)))  # fmt: skip
    return made


def train(bench: Bench, name: str, *, levers: Levers | None = None, **loop: Any) -> dict[str, Any]:
    """One training from the same weights; what it did, as far as it can be compared."""
    for parameter, value in zip(bench.loaded.trainable_parameters(), bench.start, strict=True):
        parameter.data.copy_(value)
    bench.loaded.logit_bytes, bench.calls = type(bench.loaded).logit_bytes, 0
    preference = name.startswith("dpo")
    method: Any = Dpo() if preference else Sft()
    items: Any = pairs if preference else rows
    plain = method.loss

    def loss(loaded: Any, batch: Any) -> Any:
        bench.calls += 1
        if bench.on_call is not None:
            bench.on_call(bench.calls, not loaded.model.training)
        return plain(loaded, batch)

    method.loss = loss
    seen: list[list[str]] = []
    step_module._update = lambda session, found: UPDATE(session, noted(seen, found))
    session_module.LoopState = lambda: STATE(levers=levers or Levers())
    loop_module.plot_loss = lambda *_: None
    folder = RunFolder(bench.folder / "run")
    shutil.rmtree(folder.path, ignore_errors=True)
    values = {"batch_size": BATCH, "accumulation_steps": ACCUMULATION, "max_steps": STEPS, "learning_rate": 1e-4}
    run = RunSettings(save_steps=1000, eval_steps=STEPS // 2, logging_steps=1)
    console = Console(file=io.StringIO(), width=250)
    failures, started = bench.failures(), time.time()
    with claim(folder, run, lambda line: None) as store:
        job = TrainingJob(
            loaded=bench.loaded, template=ChatTemplate.from_tokenizer(bench.loaded.tokenizer), method=method,
            train_items=items(24, 1, bench.lengths), eval_items=items(6, 7, bench.lengths), tuning=TINY,
            loop=LoopSettings(**values | JOBS[name] | loop), run=run, folder=folder, store=store, console=console,
            watch=WatchSettings(no_keep_best=True),
            manifest=RunManifest(command="sft", model="random", base_fingerprint=bench.loaded.fingerprint),
            meter=FakeMeter(bench.card, True) if bench.card else GpuMeter(bench.loaded.device),
        )  # fmt: skip
        result = loop_module.train(job)
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    text = console.file.getvalue()
    return {
        "steps": result.steps, "samples": [sorted(sources) for sources in seen], "calls": bench.calls,
        "loss": [line["loss"] for line in lines], "eval_loss": [x["eval_loss"] for x in lines if "eval_loss" in x],
        "adapter": [p.detach().clone() for p in bench.loaded.trainable_parameters()],
        "refused": bench.failures() - failures, "left_out": text.count("is left out"), "peak": bench.peak(),
        "actions": [line for line in text.splitlines() if "out of GPU memory" in line],
        "seconds": time.time() - started,
    }  # fmt: skip


def noted(seen: list[list[str]], found: Any) -> Any:
    """Keep the samples of a step that is about to be applied."""
    seen.append([source for batch in found.batches for source in batch.sources])
    return found


def difference(one: dict[str, Any], other: dict[str, Any], key: str = "loss") -> float:
    """Largest relative difference of two runs' losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(one[key], other[key], strict=True))


@dataclass
class Reference:
    """What is known of a job undisturbed."""

    run: dict[str, Any]
    least: int
    evaluation: tuple[int, int]
    """Bytes in use before and at the peak of an evaluation."""
    evaluation_calls: list[int]
    noise: float


def reference(bench: Bench, name: str) -> Reference:
    """Undisturbed runs: as planned, in smaller micro-batches, with every lever pulled; and what an evaluation needs."""
    evaluation, calls, top = [0, 0], [], [0]

    def watch(call: int, evaluating: bool) -> None:
        if not evaluating:
            return
        top[0] = max(top[0], bench.peak())
        if calls and call == calls[-1] + 1:
            evaluation[1] = max(evaluation[1], bench.peak())
        bench.reset_peak()
        if not calls or call != calls[-1] + 1:
            evaluation[0] = bench.peak()
        calls.append(call)

    bench.cap(None)
    bench.reset_peak()
    bench.on_call = watch
    run = train(bench, name)
    bench.on_call = None
    run["peak"] = max(top[0], bench.peak())
    others = [train(bench, name, batch_size=2, accumulation_steps=4)]
    everything = Levers(checkpointing=True, logit_bytes=16 * 2**20, offload=bench.card is None)
    bench.reset_peak()
    others.append(train(bench, name, levers=everything, batch_size=1, accumulation_steps=BATCH * ACCUMULATION))
    noise = max(difference(other, run) for other in others)
    return Reference(run, others[-1]["peak"], (evaluation[0], evaluation[1]), calls, noise)


def point(bench: Bench, known: Reference, name: str, kind: str, chooser: random.Random) -> dict[str, Any]:
    """One training under a cap, compared with the undisturbed one."""
    lowest, highest = int(1.12 * known.least), int(0.9 * known.run["peak"])
    call = 0
    if kind == "in the evaluation":
        before, most = known.evaluation
        lowest, highest = (int(before + share * (most - before)) for share in (0.4, 0.85))
        call = chooser.choice(known.evaluation_calls)
    elif kind == "later":
        call = chooser.randrange(known.run["calls"] // 8, 5 * known.run["calls"] // 8)
    limit = chooser.randrange(lowest, max(lowest + 1, highest))

    def shrink(now: int, evaluating: bool) -> None:
        if now == call:
            bench.cap(limit)
        elif kind == "in the evaluation" and now > call and not evaluating:
            bench.cap(None)

    bench.cap(limit if call == 0 else None)
    bench.on_call = shrink
    try:
        run = train(bench, name)
    finally:
        bench.on_call = None
        bench.cap(None)
    same = run["left_out"] == 0
    scale = max(p.abs().max().item() for p in known.run["adapter"])
    apart = max((a - b).abs().max().item() for a, b in zip(run["adapter"], known.run["adapter"], strict=True))
    return {
        "job": name, "kind": kind, "cap_gib": round(limit / GIB, 3), "refused": run["refused"],
        "actions": len(run["actions"]), "steps": run["steps"], "same_samples": run["samples"] == known.run["samples"],
        "loss_difference": difference(run, known.run), "noise": known.noise,
        "eval_difference": difference(run, known.run, "eval_loss") if same else None, "left_out": run["left_out"],
        "adapter_difference": apart / scale, "seconds": round(run["seconds"], 2),
        "levers": [line.partition("done again with ")[2].partition(". Each")[0][:60] for line in run["actions"]],
    }  # fmt: skip


def good(outcome: dict[str, Any], limit: float) -> bool:
    """All steps, the same samples, the same loss within rounding."""
    return outcome["steps"] == STEPS and outcome["same_samples"] and outcome["loss_difference"] <= limit


def run(
    model: Path, points: int, seconds: float, dry: bool, first: int = 0, until: int | None = None
) -> dict[str, Any]:
    """All points, or a part of them; stops to begin new ones when the time is up."""
    started = time.time()
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    dtype = torch.float32 if dry else torch.bfloat16
    loaded = load_model(ModelSettings(model=str(model)), dtype=dtype, for_training=True, tuning=TINY, device=device)
    lengths = (20, 120) if dry else (120, 2000)
    memory = Path("/dev/shm")
    folder = memory / f"out_of_memory_{os.getpid()}" if memory.is_dir() else model / "runs"
    bench = Bench(loaded, folder, lengths, FakeCard() if dry else None)
    bench.start = [p.detach().clone() for p in loaded.trainable_parameters()]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    outcomes: list[dict[str, Any]] = []
    references: dict[tuple[str, torch.dtype], Reference] = {}
    gc.collect()
    gc.freeze()
    with bench.card or torch.enable_grad():
        for number in range(first, points if until is None else until):
            exact = number >= points // 2
            if exact and loaded.dtype != torch.float32:
                loaded.model.float()
                loaded.dtype = torch.float32
            name, kind = list(JOBS)[number % len(JOBS)], KINDS[number // len(JOBS) % len(KINDS)]
            if (name, loaded.dtype) not in references:
                references[name, loaded.dtype] = reference(bench, name)
            known = references[name, loaded.dtype]
            outcome = point(bench, known, name, kind, random.Random(number))
            limit = max(4 * known.noise, LEAST[loaded.dtype])
            outcome |= {"point": number, "dtype": str(loaded.dtype)[6:], "limit": limit, "good": good(outcome, limit)}
            outcomes.append(outcome)
            print(json.dumps(outcome), flush=True)
            if time.time() - started > seconds:
                break
    shutil.rmtree(folder, ignore_errors=True)
    by_dtype = {d: [o for o in outcomes if o["dtype"] == d] for d in {o["dtype"] for o in outcomes}}
    return {
        "what": "out_of_memory", "points": len(outcomes), "good": sum(o["good"] for o in outcomes),
        "struck": sum(o["refused"] > 0 for o in outcomes), "refused": sum(o["refused"] for o in outcomes),
        "worst_loss_difference": {d: max(o["loss_difference"] for o in found) for d, found in by_dtype.items()},
        "noise": {d: max(o["noise"] for o in found) for d, found in by_dtype.items()},
        "left_out": sum(o["left_out"] for o in outcomes), "seconds": round(time.time() - started, 1),
        "gpu": "none" if dry else torch.cuda.get_device_name(0), "torch": torch.__version__,
    }  # fmt: skip


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "run", "dry"])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("/tmp/out_of_memory_tiny"))
    parser.add_argument("points", nargs="?", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--first", type=int, default=0, help="go on at this point")
    parser.add_argument("--until", type=int, help="end before this point, so that two GPUs can share the work")
    given = parser.parse_args()
    if given.what == "make":
        print(json.dumps(make(given.folder)), flush=True)
        return
    if given.what == "dry" and not given.folder.is_dir():
        make(given.folder, hidden=256, layers=2, vocabulary=5120)
    outcome = run(given.folder, given.points, given.seconds, given.what == "dry", given.first, given.until)
    print(json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
