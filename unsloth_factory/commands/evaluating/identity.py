"""What makes a model the same one, for results that are kept on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unsloth_factory.commands.source import ResolvedModel
from unsloth_factory.model.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.atomic import sha256


def model_identity(variant: str, resolved: ResolvedModel, loaded: LoadedModel) -> str:
    """All of the model that its scores and answers depend on; the base does not depend on the adapter."""
    parts: dict[str, Any] = {
        "fingerprint": loaded.fingerprint,
        "engine": loaded.engine,
        "dtype": str(loaded.dtype),
        "device": loaded.device.type,
        "quantized": loaded.quantized,
    }
    if variant == "tuned" and resolved.settings.adapter:
        folder = Path(resolved.settings.adapter).expanduser()
        parts["adapter"] = {name: sha256(folder / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)}
    return json.dumps(parts, sort_keys=True)
