"""Room on the disk for everything that a plan will export, asked before it trains for hours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from unsloth_factory.config.errors import UserError
from unsloth_factory.export.quantize import parse_types
from unsloth_factory.export.space import gguf_bytes, merged_bytes, quantized_bytes, stored_weights
from unsloth_factory.model.paths import TINY_NAME, resolve_model
from unsloth_factory.run.atomic import require_free_space
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.run.stages import files_below


class PlannedStage(Protocol):
    """What is read of a stage."""

    @property
    def command(self) -> str:
        """Name of its command."""

    @property
    def config(self) -> Any:
        """Its settings."""

    @property
    def folder(self) -> Path:
        """Run folder that it works on."""


def require_plan_space(root: Path, stages: Sequence[PlannedStage]) -> None:
    """Refuse a plan whose merged models, GGUF and quantised files do not fit the disk together.

    Checkpoints are the training's own matter (it asks before its first step); what is there already is not counted.

    Raises:
        UserError: There is not enough room.
    """
    training = next((stage for stage in stages if hasattr(stage.config, "tuning")), None)
    folder = _local_model(training.config.model.model if training else None)
    if folder is None:
        return
    weights = stored_weights(folder)
    needed, there = 0, set()
    for stage in stages:
        run = RunFolder(stage.folder)
        if stage.command == "merge":
            needed += merged_bytes(weights)
            there.update(files_below([run.merged_model]))
        elif stage.command in ("gguf", "quantize"):
            kinds = getattr(stage.config, "types", None)
            outtype = getattr(stage.config, "outtype", "f16")
            imatrix = getattr(stage.config, "imatrix", False)
            wanted = parse_types(kinds, imatrix=imatrix) if kinds else []
            needed += quantized_bytes(weights, wanted) if kinds else gguf_bytes(weights, outtype)
            there.update(files_below([run.gguf]))
    missing = needed - sum(path.stat().st_size for path in there)
    if missing > 0:
        require_free_space(root, missing, "What this plan exports (merged model, GGUF and quantised files)")


def _local_model(name: str | None) -> Path | None:
    """The base model's folder, where it is on this disk and in order; what is wrong with it the training will say."""
    if name is None or not (name == TINY_NAME or Path(name).expanduser().is_dir()):
        return None
    try:
        return resolve_model(name)
    except UserError:
        return None
