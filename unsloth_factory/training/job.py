"""The values that enter and leave a training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from unsloth_factory.config.settings import GuardSettings, LoopSettings, RunSettings, TuningSettings, WatchSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenPair, TokenSample
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.folder import RunFolder, RunManifest
from unsloth_factory.training.checkpoints.store import CheckpointStore
from unsloth_factory.training.memory.meter import Meter
from unsloth_factory.training.methods.base import Method


class Answerer(Protocol):
    """Answers held-out questions with the weights as they are; handed in, because training knows no inference."""

    def __len__(self) -> int:
        """Questions that can be asked."""
        ...

    def ask(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Greedy answers to some questions, numbered from 0, together.

        Each is a record with source, prompt, reference, answer, stopped and scores (name -> value or None).
        """
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that `train` needs."""

    loaded: LoadedModel
    """Loaded for training: the parameters that train have `requires_grad`."""
    template: ChatTemplate
    method: Method
    train_items: Sequence[TokenSample] | Sequence[TokenPair]
    eval_items: Sequence[TokenSample] | Sequence[TokenPair] = ()
    """Held-out samples for the evaluation loss; may be empty."""
    held_out: Sequence[Conversation] = ()
    """The conversations behind `eval_items`, stored for the later commands."""
    general_items: Sequence[TokenSample] = ()
    """General questions whose loss tells what is forgotten; may be empty."""
    replay_items: Sequence[TokenSample] = ()
    """General questions that --forgetting replay mixes in; none of `general_items`."""
    answerer: Answerer | None = None
    """Answers held-out questions at each evaluation."""
    tuning: TuningSettings
    loop: LoopSettings
    run: RunSettings
    watch: WatchSettings = field(default_factory=WatchSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    folder: RunFolder
    manifest: RunManifest
    """Stored as run.yaml before the first step."""
    store: CheckpointStore
    """From `checkpoint.claim(folder, run)`, which holds the run folder."""
    started: float = field(default_factory=time.monotonic)
    """When the time of --time_budget began, on the clock of `time.monotonic`, s."""
    resume_command: str = "the same command with --resume auto"
    """How to go on after a signal, for the message."""
    meter: Meter | None = None
    """Where the memory figures come from; default: the device's own."""
    console: Console | None = None
    """Where lines and progress go; default: standard output."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training did."""

    steps: int
    """Optimizer steps, over all parts of a resumed run."""
    final_loss: float | None
    """Mean loss of the last applied step, per token (SFT) or pair (DPO)."""
    eval_loss: float | None
    """Loss on the held-out samples at the end."""
    best_eval_loss: float | None
    """Lowest of all evaluations."""
    best_step: int | None
    """Step of the best evaluation by --metric_for_best."""
    best_value: float | None
    """That metric at that step."""
    final_step: int
    """Step that the final weights were taken from."""
    end: str | None
    """Why the run ended before its last step; None when it did not."""
    eval_metrics: dict[str, float]
    """Further figures at the end; DPO: rewards/accuracies, rewards/margins, ..."""
    seconds: float
    """Wall time of the training steps, evaluations and saves, over all parts of a resumed run."""
    tokens: int
    trained_tokens: int
    """Tokens whose loss counted."""
    skipped_steps: int
    """Steps whose loss or gradient was not finite; they were not applied."""
    scaler_skips: int
    """Steps that the fp16 loss scaler skipped."""
    spikes: int
    """Steps whose loss or gradient was far above the recent ones."""
    rewound: bool
    """The run went back to a checkpoint once, after too many such steps in a row."""
    resumed_from: int | None
    """Step of the checkpoint that this part started from."""
    adapter_path: Path
    """final_adapter/, or final_model/ after full and freeze training."""
