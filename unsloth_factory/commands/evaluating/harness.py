"""`uf evaluate --task lm_eval:NAME`: a task of lm-evaluation-harness; base and tuned from one load."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from rich.console import Console

from unsloth_factory.commands.source import load_source, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.harness.model import PREFIX, harness_model, require_harness
from unsloth_factory.evaluation.harness.report import HarnessOptions, evaluate_harness, load_tasks
from unsloth_factory.evaluation.tables import print_report
from unsloth_factory.run.atomic import write_json, write_text

NOT_THEIRS = ("task_dir", "subjects", "lang", "split", "scorer", "thinking_budget")
"""Flags that a task of the harness has no use for."""


def run_harness(config: EvaluateConfig) -> int:
    """Run the task, save report and records, print the table."""
    require_harness()
    for name in NOT_THEIRS:
        if getattr(config, name) is not None:
            raise UsageError(f"--{name} is not for tasks of lm-evaluation-harness: their YAML says it.")
    if config.choice_mode != "letter":
        raise UsageError("--choice_mode is not for tasks of lm-evaluation-harness: their YAML says it.")
    if config.think_chain and config.no_chat_template:
        raise UsageError("--think_chain needs the chat template: --no_chat_template does not go with it.")
    console = Console()
    options = HarnessOptions(
        task=config.task.removeprefix(PREFIX),
        include=config.lm_eval_include,
        n_shot=config.n_shot,
        max_samples=config.max_samples,
        max_new_tokens=config.max_new_tokens,
        chat_template=not config.no_chat_template,
    )
    manager = load_tasks(options)
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    loaded, template = load_source(resolved, console)
    thinking = resolved.thinking if config.think_chain is None else config.think_chain
    model = harness_model(
        loaded, template, thinking=thinking if options.chat_template else None, batch_size=config.batch_size
    )
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        variant: loaded.adapter_disabled if variant == "base" else nullcontext for variant in resolved.variants
    }
    report, records = evaluate_harness(manager, model, contexts, options, resolved.description(loaded))
    report.settings["thinking"] = thinking if options.chat_template else None
    print_report(report, console)
    folder = resolved.results("evaluation_results", config.save_dir)
    name = "lm_eval_" + re.sub(r"[^\w.-]+", "_", options.task)
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    for path in (
        write_json(folder / f"{name}.json", report.to_dict()),
        write_text(folder / f"{name}_samples.jsonl", "".join(lines)),
    ):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0
