"""The values that enter and leave a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from unsloth_factory.config.settings import LoopSettings, RunSettings, TuningSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenPair, TokenSample
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.folder import RunFolder, RunManifest
from unsloth_factory.training.checkpoint import CheckpointStore
from unsloth_factory.training.methods.base import Method


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
    tuning: TuningSettings
    loop: LoopSettings
    run: RunSettings
    folder: RunFolder
    manifest: RunManifest
    """Stored as run.yaml before the first step."""
    store: CheckpointStore
    """From `checkpoint.claim(folder, run)`, which holds the run folder."""
    resume_command: str = "the same command with --resume auto"
    """How to go on after a signal, for the message."""
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
    best_step: int | None
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
    rewound: bool
    """The run went back to a checkpoint once, after too many such steps in a row."""
    resumed_from: int | None
    """Step of the checkpoint that this part started from."""
    adapter_path: Path
    """final_adapter/, or final_model/ after full and freeze training."""
