"""The table of training methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from unsloth_factory.training.methods.base import LossSum, Method
from unsloth_factory.training.methods.dpo import Dpo
from unsloth_factory.training.methods.sft import Sft

METHODS: dict[str, Callable[..., Any]] = {"sft": Sft, "dpo": Dpo}
"""Name -> class; its keyword arguments are the method's own settings."""

__all__ = ["METHODS", "Dpo", "LossSum", "Method", "Sft"]
