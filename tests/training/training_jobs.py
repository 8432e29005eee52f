"""A complete small training job, with anything in it replaceable."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from unsloth_factory.config.settings import LoopSettings, ModelSettings, RunSettings, TuningSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenPair, TokenSample, Turn
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.atomic import sha256
from unsloth_factory.run.folder import RunFolder, RunManifest
from unsloth_factory.training import loop as loop_module
from unsloth_factory.training import session as session_module
from unsloth_factory.training.checkpoints.store import claim
from unsloth_factory.training.job import TrainingJob
from unsloth_factory.training.methods import Sft
from unsloth_factory.training.pacing.time_budget import TimeBox

torch.set_num_threads(1)
CPU = torch.device("cpu")


def samples(count: int, seed: int = 0, longest: int = 24) -> list[TokenSample]:
    """Random token rows with a prompt (not trained) and an answer."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        length = int(generator.integers(8, longest))
        trained = np.arange(length) >= generator.integers(2, 6)
        ids = generator.integers(5, 300, length).astype(np.int32)
        rows.append(TokenSample(ids, trained, f"train.jsonl:{number + 1}"))
    return rows


def pairs(count: int, seed: int = 0) -> list[TokenPair]:
    """Random preference pairs that share their prompt."""
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        prompt = generator.integers(5, 300, 5)
        both = []
        for _ in range(2):
            answer = generator.integers(5, 300, int(generator.integers(3, 12)))
            ids = np.concatenate([prompt, answer]).astype(np.int32)
            both.append(TokenSample(ids, np.arange(len(ids)) >= 5, f"pairs.jsonl:{number + 1}"))
        rows.append(TokenPair(*both))
    return rows


def load(folder: Path, tuning: TuningSettings | None = None) -> LoadedModel:
    """A model for training on the CPU in float32."""
    tuning = tuning or TuningSettings(lora_r=4)
    return load_model(
        ModelSettings(model=str(folder)),
        quantization_bit=tuning.quantization_bit,
        dtype=torch.float32,
        for_training=True,
        tuning=tuning,
        device=CPU,
    )


def make_job(folder: Path, loaded: LoadedModel, store: Any, **changes: Any) -> TrainingJob:
    """A small SFT job; keyword arguments replace its fields."""
    loop = {"epochs": 2.0, "batch_size": 2, "accumulation_steps": 2, "learning_rate": 1e-2} | changes.pop("loop", {})
    template = ChatTemplate.from_tokenizer(loaded.tokenizer)
    values: dict[str, Any] = {
        "loaded": loaded,
        "template": template,
        "method": Sft(),
        "train_items": samples(18),
        "held_out": [Conversation((Turn("user", "一"), Turn("assistant", "二", "三")), "held.jsonl:1")],
        "tuning": TuningSettings(lora_r=4),
        "loop": LoopSettings(**loop),
        "run": store.settings,
        "folder": RunFolder(folder),
        "manifest": RunManifest(command="sft", model="random", base_fingerprint=loaded.fingerprint, config={"a": 1}),
        "store": store,
        "console": Console(file=io.StringIO(), width=200),
    }
    return TrainingJob(**(values | changes))


@pytest.fixture
def job_in(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TrainingJob]]:
    """job_in(folder, **changes): claims the folder and gives a job; `run` and `loop` are dicts of settings.

    The loss plot, a third of the time of such a small run, is drawn only with plot=True.
    """
    real_plot = loop_module.plot_loss
    with ExitStack() as stack:

        def build(folder: Path, **changes: Any) -> TrainingJob:
            stack.close()  # the claim of the job before
            monkeypatch.setattr(loop_module, "plot_loss", real_plot if changes.pop("plot", False) else lambda *_: None)
            tuning = changes.setdefault("tuning", TuningSettings(lora_r=4))
            settings = RunSettings(**({"save_steps": 3, "logging_steps": 1} | changes.pop("run", {})))
            console = changes.setdefault("console", Console(file=io.StringIO(), width=200))
            store = stack.enter_context(claim(RunFolder(folder), settings, console.print))
            loaded = changes.pop("loaded", None) or load(random_model_dir, tuning)
            return make_job(folder, loaded, store, **changes)

        yield build


class Ticking(Sft):
    """SFT on a clock of its own: every micro-batch takes a tenth of a second, and nothing else takes any time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(session_module, "TimeBox", partial(TimeBox, clock=lambda: self.now))

    def loss(self, loaded: Any, batch: Any) -> Any:
        self.now += 0.1
        return super().loss(loaded, batch)


def said(job: TrainingJob) -> str:
    """Everything that the job printed."""
    assert job.console is not None
    return job.console.file.getvalue()  # type: ignore[attr-defined]


def stopping(method: Any, call: int, number: int = signal.SIGTERM) -> Any:
    """The method, with a signal in the middle of its n-th loss."""
    plain, calls = method.loss, iter(range(1, 1_000_000))

    def loss(loaded: Any, batch: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), number)
        return plain(loaded, batch)

    method.loss = loss
    return method


def weights(job: Any) -> dict[str, str]:
    """File -> SHA-256 of the final weights."""
    folder = job.folder.final_adapter if job.loaded.has_adapter else job.folder.final_model
    return {path.name: sha256(path) for path in sorted(folder.glob("*.safetensors"))}


def metrics(job: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what differs between two runs."""
    volatile = ("time", "tokens_per_second", "memory")
    lines = [json.loads(line) for line in job.folder.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in volatile} for line in lines]
