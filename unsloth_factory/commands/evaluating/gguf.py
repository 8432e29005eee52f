"""`uf evaluate --gguf`: the same questions and token ids, scored through llama.cpp; each file is a variant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from unsloth_factory.commands.evaluating.setup import scored_setup
from unsloth_factory.commands.gguf_files import described_files, gguf_paths, gguf_variants, shortest_context
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel, gguf_template, require_same_tokenizer, resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.evaluation.choice.benchmark import Benchmark, select_subjects
from unsloth_factory.evaluation.choice.kept_scores import KeptScores
from unsloth_factory.evaluation.choice.prompts import ChoicePrompt
from unsloth_factory.evaluation.choice.scored import ChoiceResult, evaluate
from unsloth_factory.evaluation.compare.agreement import agreement
from unsloth_factory.evaluation.generated.generation_task import GenerationTask, check_split, read_problems
from unsloth_factory.evaluation.generated.generative import (
    Answerer,
    GenerativeOptions,
    GenerativeResult,
    evaluate_generated,
)
from unsloth_factory.evaluation.generated.kept_answers import KeptAnswers
from unsloth_factory.evaluation.gguf_file import GgufFile, TokenComparison
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.inference.generate import Generation
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import require_library


def check_files(wanted: str, resolved: ResolvedModel) -> tuple[dict[str, Path], dict[str, Any], int]:
    """(variant -> file, what a report says of the model, positions that every file has), from headers and hashes."""
    require_library("cyllama", "scoring a GGUF file")
    files = gguf_variants(gguf_paths(wanted, resolved))
    headers = [read_header(path) for path in files.values()]
    engine = f"llama.cpp (cyllama {version('cyllama')})"
    description = {"model": resolved.settings.model, "engine": engine, "gguf": described_files(files)}
    return files, description, shortest_context(headers)


def score_files(
    config: EvaluateConfig, benchmark: Benchmark, folder: Path, split: str, console: Console
) -> tuple[ChoiceResult, Path]:
    """(result, folder for it) of a benchmark of choices; the files are scored in turn, one is open at a time.

    Args:
        config: The command's settings, with --gguf.
        benchmark: What is scored.
        folder: Its data.
        split: Of its questions.
        console: For progress.

    Raises:
        UsageError: A flag says nothing about a GGUF file.
        UserError: A file is damaged, or was made from another model.
    """
    resolved = _resolved(config)
    select_subjects(benchmark, folder, split, config.subjects)
    files, description, positions = check_files(str(config.gguf), resolved)
    template = gguf_template(resolved)
    maker, options = scored_setup(config, benchmark, split, template, positions)
    target = resolved.results("evaluation_results", config.save_dir)
    subjects = target / f"{benchmark.name}_subjects"
    refuse_other = partial(require_same_tokenizer, template=template, resolved=resolved)
    kept, tokens = {}, {}
    for name, path in files.items():
        kept[name] = KeptScores(subjects, _identity(description, name))
        tokens[name] = TokenComparison(template.tokenizer, template.control_tokens)
        with GgufFile(path, refuse_other) as file, counting(console, f"{benchmark.title}, {name}: subjects") as p:
            compare = partial(tokens[name].add, file)
            scorers, own = {name: file.score}, {name: kept[name]}
            evaluate(maker, folder, scorers, options, kept=own, check=compare, on_progress=p)
    _say_found(console, sum(scores.found for scores in kept.values()), subjects)
    # All scores lie there now: this pass only puts them into one report.
    result = evaluate(maker, folder, dict.fromkeys(files, _not_kept), options, model=description, kept=kept)
    return _with_comparisons(result, tokens, console), target


def _resolved(config: EvaluateConfig) -> ResolvedModel:
    if config.quantization_bit:
        raise UsageError(
            f"--quantization_bit {config.quantization_bit} loads a model in NF4; a GGUF file has its own type. "
            "Give --gguf or --quantization_bit."
        )
    return resolve_source(config.source, config.model)


def _identity(description: dict[str, Any], name: str) -> str:
    """All that a file's scores and answers depend on, beside the prompts."""
    identity = {"gguf": description["gguf"][name]["sha256"], "engine": description["engine"]}
    return json.dumps(identity, sort_keys=True)


def _not_kept(prompts: Any, choices: Any) -> np.ndarray:
    raise UserError("llama.cpp gave log-probabilities that are no finite numbers. Make the file again: uf gguf.")


def _with_comparisons(result: ChoiceResult, tokens: dict[str, TokenComparison], console: Console) -> ChoiceResult:
    """The result with what is known of its token ids, and each file compared with the first (the largest)."""
    first, *others = tokens
    records = {name: [record[name] for record in result.records] for name in tokens}
    compared = {name: {"with": first, **asdict(agreement(records[first], records[name]))} for name in others}
    report = _with_token_ids(result.report, tokens, console)
    return replace(result, report=replace(report, details={**report.details, "agreement": compared}))


def _with_token_ids(report: EvalReport, tokens: dict[str, TokenComparison], console: Console) -> EvalReport:
    """The report with how many prompts llama.cpp's tokenizer splits as the model's own; said on the console too."""
    for name, found in tokens.items():
        line = f"{name}: token ids of {found.equal:,} of {found.compared:,} prompts equal llama.cpp's own"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    notes = tuple(note for name, found in tokens.items() if (note := found.note(name)))
    ids = {name: {"prompts": found.compared, "equal": found.equal} for name, found in tokens.items()}
    return replace(report, notes=(*report.notes, *notes), details={**report.details, "token_ids": ids})


def _say_found(console: Console, found: int, subjects: Path) -> None:
    """Say how many subjects' scores were taken from the disk."""
    if found:
        line = f"{found} subjects' scores by the same model on the same prompts were there: {subjects}"
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def answer_with_files(
    config: EvaluateConfig, task: GenerationTask, folder: Path, split: str, console: Console
) -> tuple[GenerativeResult, Path]:
    """(result, folder for it) of a benchmark whose answers are generated; arguments and errors as `score_files`.

    Answers are kept one by one: hours on a CPU are not lost to a stop.
    """
    resolved = _resolved(config)
    check_split(task, split, config.shots)
    read_problems(task, folder, split)
    files, description, positions = check_files(str(config.gguf), resolved)
    template = gguf_template(resolved)
    options = GenerativeOptions(
        n_shot=config.shots,
        split=split,
        lang=config.lang or next(iter(task.prompts)),
        thinking=resolved.thinking if config.think_chain is None else config.think_chain,
        max_samples=config.max_samples,
        max_new_tokens=config.max_new_tokens or task.max_new_tokens,
        max_tokens=positions,
    )
    target = resolved.results("evaluation_results", config.save_dir)
    refuse_other = partial(require_same_tokenizer, template=template, resolved=resolved)
    tokens = {name: TokenComparison(template.tokenizer, template.control_tokens) for name in files}
    limits = {"max_new_tokens": options.max_new_tokens, "stop_ids": sorted(template.stop_ids)}

    def answer_with(name: str, path: Path) -> Answerer:
        def answer(prompts: Sequence[list[int]]) -> list[Generation]:
            kept = KeptAnswers(target / f"{task.name}_answers", _identity(description, name), limits, chunk=1)
            with GgufFile(path, refuse_other) as file, counting(console, f"{task.title}, {name}: answers") as progress:
                tokens[name].add(file, [ChoicePrompt(ids, [], template.tokenizer.decode(ids)) for ids in prompts])
                ask = partial(file.answer, stop_ids=template.stop_ids, max_new_tokens=options.max_new_tokens)
                return kept.complete(ask, prompts, progress)

        return answer

    answerers = {name: answer_with(name, path) for name, path in files.items()}
    result = evaluate_generated(task, template, folder, answerers, options, model=description)
    return replace(result, report=_with_token_ids(result.report, tokens, console)), target
