"""May this run continue that checkpoint? Compared setting by setting, so that the message can name what changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import GuardSettings, LoopSettings, RunSettings, TuningSettings, WatchSettings
from unsloth_factory.data.types import TokenPair, TokenSample
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.folder import RunFolder

TUNING_KEYS = (
    "finetuning_type", "lora_r", "lora_alpha", "lora_dropout", "lora_target", "freeze_last_n",
)  # fmt: skip
LOOP_KEYS = ("epochs", "max_steps", "lr_scheduler_type", "warmup_ratio", "optimizer", "weight_decay", "max_grad_norm")
HARMLESS = {
    "batch_size": "same samples in each step; results differ by rounding only",
    "accumulation_steps": "same samples in each step; results differ by rounding only",
    "no_packing": "same samples in each step; results differ by rounding only",
    "no_gradient_checkpointing": "speed and memory only",
    "dataloader_workers": "no effect on the samples",
    "save_steps": "saving only",
    "save_total_limit": "saving only",
    "logging_steps": "printing only",
    "eval_steps": "evaluation only",
    "report_to": "reporting only",
    "time_budget": "the learning rate decays to the new end",
    "metric_for_best": "from here on",
    "early_stopping_patience": "from here on",
    "early_stopping_min_delta": "from here on",
    "load_best": "choice of the final weights only",
    "no_keep_best": "saving only",
    "sample_generations": "evaluation only",
    "sample_max_new_tokens": "evaluation only",
    "forgetting": "from here on",
    "forgetting_limit": "from here on",
    "general_dataset": "evaluation only, until replay begins",
    "replay_samples": "from here on",
    "max_bad_steps": "from here on",
    "on_bad_steps": "from here on",
    "loss_spike": "from here on",
}
"""Settings that may change between the parts of one run, and what that means."""
BOUND_TO_WEIGHTS = {"base", "quantization_bit", "chat_template", *TUNING_KEYS}
"""What the weights of a checkpoint were made for: under other values they cannot be the start of a new run."""
WHAT = {
    "data": "training samples (SHA-256)",
    "base": "base model (fingerprint)",
    "chat_template": "chat template (SHA-256)",
    "samples_per_step": "--batch_size x --accumulation_steps",
}


def fingerprint(
    *,
    method: str,
    method_settings: dict[str, Any],
    items: Sequence[TokenSample | TokenPair],
    loaded: LoadedModel,
    template_sha256: str,
    tuning: TuningSettings,
    loop: LoopSettings,
    peak_rate: float,
) -> dict[str, Any]:
    """Everything that must not change between the parts of one run, as JSON-able values."""
    required: dict[str, Any] = {
        "method": method,
        "data": data_hash(items),
        "base": loaded.fingerprint,
        # what was loaded, not what was asked for: the default differs between a GPU and a CPU
        "quantization_bit": 4 if loaded.quantized else None,
        "chat_template": template_sha256,
        "seed": loop.seed,
        "learning_rate": peak_rate,
        "samples_per_step": loop.batch_size * loop.accumulation_steps,
        "engine": loaded.engine,  # each engine's optimizer has tensors of its own
        "matmul": loaded.matmul,
    }
    required |= {key: getattr(tuning, key) for key in TUNING_KEYS}
    required |= {key: getattr(loop, key) for key in LOOP_KEYS}
    return required | method_settings


def harmless_settings(*groups: LoopSettings | RunSettings | WatchSettings | GuardSettings) -> dict[str, Any]:
    """The settings of `HARMLESS`, to say which of them changed."""
    return {key: getattr(group, key) for group in groups for key in HARMLESS if hasattr(group, key)}


def data_hash(items: Sequence[TokenSample | TokenPair]) -> str:
    """SHA-256 over the token ids and trained positions of all samples, in order."""
    digest = hashlib.sha256()
    for item in items:
        for sample in (item.chosen, item.rejected) if isinstance(item, TokenPair) else (item,):
            digest.update(len(sample.ids).to_bytes(8, "little"))
            digest.update(sample.ids.astype("<i4").tobytes())
            digest.update(sample.trained.astype("u1").tobytes())
    return digest.hexdigest()


def check_same(old: dict[str, Any], new: dict[str, Any], checkpoint: Path) -> None:
    """Refuse to continue with other settings.

    Raises:
        UserError: Names each changed setting with its old and new value, and the ways out.
    """
    old = {"engine": "standard", "matmul": "exact"} | old  # what there was when they were not stored yet
    changed = [key for key in new if old.get(key) != new[key]]
    if changed:
        lines = "".join(f"\n  {WHAT.get(key, f'--{key}')}: was {old.get(key)}, now {new[key]}" for key in changed)
        ways = "".join(f"\n  - {way}" for way in _ways_out(changed, old, new, checkpoint))
        raise UserError(f"{checkpoint} was made with other settings:{lines}\nThe ways out:{ways}")


def _ways_out(changed: list[str], old: dict[str, Any], new: dict[str, Any], checkpoint: Path) -> list[str]:
    ways = ["give the old values, and the run goes on"]
    if changed == ["epochs"] and new["epochs"] > old["epochs"]:
        more = new["epochs"] - old["epochs"]
        ways.append(
            f"train longer: --epochs {old['epochs']:g} --extend_epochs {more:g}, and the run goes on to epoch "
            f"{new['epochs']:g}, with a warm-up and decay of their own for the added ones"
        )
    elif set(changed) <= {"epochs", "max_steps"}:
        ways.append("train longer: give the old values and --extend_epochs N for N more epochs")
    weights = _weights_flag(checkpoint)
    if weights and not set(changed) & BOUND_TO_WEIGHTS:
        ways.append(f"a new run from these weights: {weights} and another --output_dir, without --resume")
    return [*ways, "a new run from step 0: another --output_dir, or --overwrite here"]


def _weights_flag(checkpoint: Path) -> str | None:
    """How a new run starts from the run's result, or from the checkpoint's adapter while there is none."""
    run = RunFolder(checkpoint.parent)
    if run.final_model.is_dir():
        return f"--model {run.final_model}"
    adapter = run.final_adapter if run.final_adapter.is_dir() else checkpoint / "adapter"
    return f"--adapter {adapter}" if adapter.is_dir() else None


def accepted_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each harmless setting that changed."""
    changed = [key for key in new if key in old and old[key] != new[key]]
    return [f"--{key} changed from {old[key]} to {new[key]}: accepted ({HARMLESS[key]})" for key in changed]
