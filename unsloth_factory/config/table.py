"""The table of commands: help, settings type, and where the work is done (imported only when it is chosen)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unsloth_factory.config import commands as settings


@dataclass(frozen=True)
class Command:
    """One line of the table. `target` is "module:function" below the package; the function takes the settings."""

    help: str
    config_type: type[Any]
    target: str

    def load(self) -> Callable[[Any], int]:
        """Import the module and return the function; it returns the exit code."""
        module, _, function = self.target.partition(":")
        return getattr(importlib.import_module(f"unsloth_factory.{module}"), function)


COMMANDS = {
    "sft": Command("fine-tune on conversations", settings.SftConfig, "commands.train:run_sft"),
    "dpo": Command("align on preference pairs", settings.DpoConfig, "commands.train:run_dpo"),
    "plan": Command("does a training fit, how fast, which settings", settings.PlanConfig, "commands.plan:run"),
    "validate": Command("base against tuned on held-out samples", settings.ValidateConfig, "commands.validate:run"),
    "evaluate": Command("score a benchmark such as C-Eval", settings.EvaluateConfig, "commands.evaluate:run"),
    "chat": Command("talk to the model", settings.ChatConfig, "commands.chat:run"),
    "serve": Command("answer over HTTP like OpenAI's API", settings.ServeConfig, "commands.serve:run"),
    "merge": Command("write the adapter into 16-bit weights", settings.MergeConfig, "commands.merge:run"),
    "gguf": Command("convert to GGUF and check it", settings.GgufConfig, "commands.gguf:run"),
    "quantize": Command("quantise a GGUF file", settings.QuantizeConfig, "commands.quantize:run"),
    "quality": Command("what quantising costs, and the gate", settings.QualityConfig, "commands.quality:run"),
    "deploy": Command("write the Modelfile, create the Ollama model", settings.DeployConfig, "commands.deploy:run"),
    "run": Command("all stages of a plan file", settings.RunPlanConfig, "commands.run:run"),
    "doctor": Command("what this machine has, and how to mend it", settings.DoctorConfig, "commands.doctor:run"),
    "demo": Command("the whole factory on bundled data, offline", settings.DemoConfig, "commands.demo:run"),
}
