"""Memory runs out at 50 random points of small trainings; every one ends as if it had not.

A fake allocator (`fake_card.py`) fails on the CPU: once, at a random allocation of the forward or backward pass, of the
recomputation in it, of clipping, of the optimizer's update, of the evaluation, or in between; or, from a random moment
on, whenever more would be in use than a random limit. LoRA dropout is 0: masks are drawn micro-batch by micro-batch, so
with dropout a step that is cut differently has other masks.

OOM_POINTS sets how many points (50), SEED where they lie.
"""

from __future__ import annotations

import gc
import io
import json
import os
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "training")]

from fake_card import FakeCard, FakeMeter  # noqa: E402
from training_jobs import load, make_job, pairs, said, samples  # noqa: E402

from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.config.settings import RunSettings, TuningSettings  # noqa: E402
from unsloth_factory.model.loaded import LoadedModel  # noqa: E402
from unsloth_factory.run.folder import RunFolder  # noqa: E402
from unsloth_factory.training import loop as loop_module  # noqa: E402
from unsloth_factory.training import session as session_module  # noqa: E402
from unsloth_factory.training import step as step_module  # noqa: E402
from unsloth_factory.training.checkpoints import tensors  # noqa: E402
from unsloth_factory.training.checkpoints.store import claim  # noqa: E402
from unsloth_factory.training.memory.levers import Levers  # noqa: E402
from unsloth_factory.training.methods import Dpo  # noqa: E402

POINTS = int(os.environ.get("OOM_POINTS", "50"))
SEED = os.environ.get("SEED", "7")
STEPS = 3
LOGITS = 4 * 640 * 8  # bytes of the logits of eight positions
JOBS: dict[str, dict[str, Any]] = {
    "sft packed": {},
    "sft padded": {"loop": {"no_packing": True}},
    "dpo packed": {"dpo": True},
    "sft recomputed": {"levers": {"checkpointing": True, "logit_bytes": LOGITS}},
    "dpo padded": {"dpo": True, "loop": {"no_packing": True, "optimizer": "adamw_8bit"}},
}
STRIKES = ("forward", "backward", "recompute", "clip", "update", "evaluation", "between")
KINDS = (*STRIKES, "limit, probed", "limit, later", "limit, later")


@dataclass
class Run:
    """What one training left."""

    card: FakeCard
    lines: list[dict[str, Any]]
    samples: list[list[str]]
    adapter: dict[str, torch.Tensor]
    text: str


class Runner:
    """Trains the same small jobs again and again, on one model in memory, each in a folder of its own."""

    def __init__(self, model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: LoadedModel = load(model, TuningSettings(lora_r=4, lora_target="q_proj,down_proj"))
        decoder = self.loaded.causal_lm.model
        decoder.layers, decoder.config.num_hidden_layers = decoder.layers[:1], 1  # half the time
        self.start = [p.detach().clone() for p in self.loaded.trainable_parameters()]
        self.logit_bytes = self.loaded.logit_bytes
        self.folder, self.patch, self.known = folder, monkeypatch, {}
        monkeypatch.setattr(loop_module, "plot_loss", lambda *_: None)
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        gc.collect()
        gc.freeze()  # what is here now need not be looked at each time that the memory runs out

    def train(self, name: str, card: FakeCard, probes: bool = False, **changes: Any) -> Run:
        job = JOBS[name] | changes
        for parameter, value in zip(self.loaded.trainable_parameters(), self.start, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        self.loaded.logit_bytes = self.logit_bytes
        levers = job.get("levers", {})
        with self.patch.context() as patch:
            patch.setattr(session_module, "LoopState", lambda: STATE(levers=Levers(**levers)))
            seen: list[list[str]] = []
            patch.setattr(step_module, "_update", lambda *given: UPDATE(*noted(seen, *given)))
            return self._train(job, card, probes, seen)

    def _train(self, job: dict[str, Any], card: FakeCard, probes: bool, seen: list[list[str]]) -> Run:
        folder = self.folder / str(len(list(self.folder.iterdir())))
        values: dict[str, Any] = {"eval_items": samples(5, seed=9), "train_items": samples(20)}
        if job.get("dpo"):
            values = {"method": Dpo(), "train_items": pairs(20), "eval_items": pairs(5, seed=9)}
        loop = {"max_steps": STEPS, "learning_rate": 2e-3, "batch_size": 3, "accumulation_steps": 2} | job.get(
            "loop", {}
        )
        run = RunSettings(save_steps=STEPS, eval_steps=STEPS, logging_steps=1)
        values["console"] = Console(file=io.StringIO(), width=200)
        with claim(RunFolder(folder), run, lambda line: None) as store:
            made = make_job(folder, self.loaded, store, loop=loop, meter=FakeMeter(card, probes), **values)
            with card:
                loop_module.train(made)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        adapter = load_file(folder / "final_adapter" / "adapter_model.safetensors")
        return Run(card, lines, seen, adapter, said(made))

    def undisturbed(self, name: str) -> Run:
        """The run without a fault, which notes where each allocation took place."""
        if name not in self.known:
            card = FakeCard()
            card.phases = []
            self.known[name] = self.train(name, card)
        return self.known[name]

    def least(self, name: str) -> int:
        """Bytes that the job needs with every lever pulled."""
        key = f"{name}, least"
        if key not in self.known:
            loop = JOBS[name].get("loop", {}) | {"batch_size": 1, "accumulation_steps": 6}
            levers = {"checkpointing": True, "logit_bytes": LOGITS}
            self.known[key] = self.train(name, FakeCard(), loop=loop, levers=levers)
        return self.known[key].card.peak


UPDATE = step_module._update
STATE = session_module.LoopState


def noted(seen: list[list[str]], session: Any, gradients: Any) -> tuple[Any, Any]:
    """Keep the samples of a step that is about to be applied."""
    seen.append([source for batch in gradients.batches for source in batch.sources])
    return session, gradients


@pytest.fixture(scope="module")
def runner(random_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unsloth_factory.training.memory.relief.LEAST_LOGITS", 4 * 640)
        yield Runner(random_model_dir, tmp_path_factory.mktemp("runs"), patch)
        gc.unfreeze()


def faulty_card(runner: Runner, name: str, kind: str, chooser: random.Random) -> FakeCard:
    undisturbed = runner.undisturbed(name)
    phases = undisturbed.card.phases or []
    if kind in STRIKES:
        kind = kind if kind in phases else "backward"
        return FakeCard(strike=chooser.choice([number for number, phase in enumerate(phases) if phase == kind]))
    since = 0 if "probed" in kind else chooser.randrange(len(phases) // 2)
    highest = max(undisturbed.card.history[since:])
    return FakeCard(limit=chooser.randrange(int(1.1 * runner.least(name)), int(0.95 * highest)), since=since)


@pytest.mark.parametrize("point", range(POINTS))
def test_it_ends_as_if_nothing_had_been(runner: Runner, point: int) -> None:
    chooser = random.Random(f"{SEED} {point}")
    kind, name = KINDS[point % len(KINDS)], list(JOBS)[point // len(KINDS) % len(JOBS)]
    expected = runner.undisturbed(name)
    run = runner.train(name, faulty_card(runner, name, kind, chooser), probes="probed" in kind)
    assert run.card.failures >= 1
    assert "out of GPU memory" in run.text or kind in ("clip", "update", "evaluation", "between")
    assert len(run.lines) == STEPS
    assert run.samples == expected.samples if "sft" in name else sorted_all(run) == sorted_all(expected)
    for line, before in zip(run.lines, expected.lines, strict=True):
        for key in ("loss", "grad_norm", "eval_loss", "rewards/margins", "eval_rewards/margins"):
            assert (key in line) == (key in before)
            assert line.get(key, 0) == pytest.approx(
                before.get(key, 0), rel=1e-4 if key == "grad_norm" else 1e-5, abs=1e-6
            ), key
        for key in ("step", "epoch", "lr", "tokens", "trained_tokens"):
            assert line[key] == before[key], key
    for tensor, value in expected.adapter.items():
        difference = (run.adapter[tensor] - value).abs().max().item()
        exact = kind in ("clip", "update", "evaluation")  # nothing was cut differently: the very same bits
        assert difference <= (0 if exact else 1e-3 * value.abs().max().item()), tensor


def test_saving_checks_the_weights_on_a_card_without_a_byte_to_spare(random_model_dir: Path) -> None:
    loaded = load(random_model_dir)
    names = list(tensors.trained(loaded))
    parameter = loaded.trainable_parameters()[2]
    with FakeCard(limit=0) as card:
        tensors.require_finite(loaded, "checkpoint-1")
        assert card.failures
        parameter.data.view(-1)[5] = float("inf")
        with pytest.raises(UserError, match=re.escape(f"1 of {len(names)} trained tensors hold NaN")):
            tensors.require_finite(loaded, "checkpoint-1")


def sorted_all(run: Run) -> list[list[str]]:
    """Samples of each step; a micro-batch of pairs lists its chosen rows before its rejected ones."""
    return [sorted(sources) for sources in run.samples]
