"""`uf evaluate --gguf`: the same questions and token ids, scored through llama.cpp; each file is a variant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from unsloth_factory.commands.gguf_files import gguf_paths, gguf_variants, shortest_context
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel, gguf_template, require_same_tokenizer
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.agreement import agreement
from unsloth_factory.evaluation.choice import ChoiceOptions, ChoiceResult, evaluate
from unsloth_factory.evaluation.gguf_file import GgufFile, TokenComparison
from unsloth_factory.evaluation.kept_scores import KeptScores
from unsloth_factory.evaluation.prompts import PromptMaker
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import require_library

Setup = Callable[[ChatTemplate, int], tuple[PromptMaker, ChoiceOptions]]
"""(template, positions of the model) -> prompts and options of the benchmark."""


def refuse_with_gguf(config: EvaluateConfig) -> None:
    """Refuse flags that say nothing about a GGUF file.

    Raises:
        UsageError: One was given beside --gguf.
    """
    if config.gguf and config.quantization_bit:
        raise UsageError(
            f"--quantization_bit {config.quantization_bit} loads a model in NF4; a GGUF file has its own type. "
            "Give --gguf or --quantization_bit."
        )


def check_files(wanted: str, resolved: ResolvedModel) -> tuple[dict[str, Path], dict[str, Any], int]:
    """(variant -> file, what a report says of the model, positions that every file has), from headers and hashes."""
    require_library("cyllama", "scoring a GGUF file")
    files = gguf_variants(gguf_paths(wanted, resolved))
    headers = [read_header(path) for path in files.values()]
    known = {
        name: {"path": str(path), "bytes": path.stat().st_size, "sha256": verify_file(path)}
        for name, path in files.items()
    }
    engine = f"llama.cpp (cyllama {version('cyllama')})"
    return files, {"model": resolved.settings.model, "engine": engine, "gguf": known}, shortest_context(headers)


def score_files(
    wanted: str, resolved: ResolvedModel, setup: Setup, folder: Path, target: Path, console: Console
) -> ChoiceResult:
    """Score a benchmark with each file in turn; one file is open at a time.

    Args:
        wanted: --gguf.
        resolved: The run or model that the files were made from.
        setup: Gives prompts and options.
        folder: The benchmark's data.
        target: Folder of the results; finished subjects are kept below it.
        console: For progress.

    Raises:
        UserError: A file is damaged, or was made from another model.
    """
    files, description, positions = check_files(wanted, resolved)
    template = gguf_template(resolved)
    maker, options = setup(template, positions)
    subjects = target / f"{maker.benchmark.name}_subjects"
    refuse_other = partial(require_same_tokenizer, template=template, resolved=resolved)
    kept, tokens = {}, {}
    for name, path in files.items():
        identity = {"gguf": description["gguf"][name]["sha256"], "engine": description["engine"]}
        kept[name] = KeptScores(subjects, json.dumps(identity, sort_keys=True))
        tokens[name] = TokenComparison(template.tokenizer, template.control_tokens)
        with GgufFile(path, refuse_other) as file, counting(console, f"{maker.benchmark.title}, {name}: subjects") as p:
            compare = partial(tokens[name].add, file)
            scorers, own = {name: file.score}, {name: kept[name]}
            evaluate(maker, folder, scorers, options, kept=own, check=compare, on_progress=p)
    say_found(console, sum(scores.found for scores in kept.values()), subjects)
    # All scores lie there now: this pass only puts them into one report.
    result = evaluate(maker, folder, dict.fromkeys(files, _not_kept), options, model=description, kept=kept)
    return _with_comparisons(result, tokens, console)


def _not_kept(prompts: Any, choices: Any) -> np.ndarray:
    raise UserError("llama.cpp gave log-probabilities that are no finite numbers. Make the file again: uf gguf.")


def _with_comparisons(result: ChoiceResult, tokens: dict[str, TokenComparison], console: Console) -> ChoiceResult:
    """The result with what is known of its token ids, and each file compared with the first (the largest)."""
    first, *others = tokens
    records = {name: [record[name] for record in result.records] for name in tokens}
    compared = {name: {"with": first, **asdict(agreement(records[first], records[name]))} for name in others}
    report = with_token_ids(result.report, tokens, console)
    return replace(result, report=replace(report, details={**report.details, "agreement": compared}))


def with_token_ids(report: EvalReport, tokens: dict[str, TokenComparison], console: Console) -> EvalReport:
    """The report with how many prompts llama.cpp's tokenizer splits as the model's own; said on the console too."""
    for name, found in tokens.items():
        line = f"{name}: token ids of {found.equal:,} of {found.compared:,} prompts equal llama.cpp's own"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    notes = tuple(note for name, found in tokens.items() if (note := found.note(name)))
    ids = {name: {"prompts": found.compared, "equal": found.equal} for name, found in tokens.items()}
    return replace(report, notes=(*report.notes, *notes), details={**report.details, "token_ids": ids})


def say_found(console: Console, found: int, subjects: Path) -> None:
    """Say how many subjects' scores were taken from the disk."""
    if found:
        line = f"{found} subjects' scores by the same model on the same prompts were there: {subjects}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
