"""Score generated answers against references: reasoning is stripped, the answer part alone is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.evaluation.averages import compare, mean_metric, normal_p
from unsloth_factory.evaluation.generated.answer_scores import F1, headline, score_answer, value_of
from unsloth_factory.evaluation.generated.generation_task import GenerationTask, Problem, check_split, read_problems
from unsloth_factory.evaluation.report import Comparison, EvalReport, Metric
from unsloth_factory.inference.generate import Generation
from unsloth_factory.scoring import mcnemar

Answerer = Callable[[Sequence[list[int]]], list[Generation]]
"""Prompts, token ids -> answers, in their order."""
STOPPED, NUMBERS = "stopped by itself", "answers with a number"
EXACT, CONTAINS = "exact match", "contains the reference"


@dataclass(frozen=True, kw_only=True)
class GenerativeOptions:
    """What is asked, and how."""

    n_shot: int = 5
    split: str = "test"
    lang: str = "en"
    thinking: bool | None = None
    max_samples: int | None = None
    """The first so many questions; None for all."""
    max_new_tokens: int = 512
    thinking_budget: int | None = None
    """Tokens after which thinking was closed, for the report."""
    room: int = 0
    """Tokens of the longest answer with its thinking; 0 for `max_new_tokens`."""
    max_tokens: int = 2**31
    """The model's context, tokens."""


@dataclass(frozen=True)
class GenerativeResult:
    """The report, and one record a question."""

    report: EvalReport
    records: list[dict[str, Any]]


def evaluate_generated(
    task: GenerationTask,
    template: ChatTemplate,
    folder: Path,
    answerers: Mapping[str, Answerer],
    options: GenerativeOptions,
    *,
    model: dict[str, Any] | None = None,
) -> GenerativeResult:
    """Ask every question of each variant and score the answers as the task says.

    Args:
        task: The benchmark.
        template: Renders the prompts; worked examples are turns.
        folder: The benchmark's data.
        answerers: variant -> answers; with "base" and "tuned" the report compares them (McNemar's exact test).
        options: What is asked.
        model: Path, adapter, engine and so on, for the report.

    Raises:
        UserError: Files that are missing or wrong; a question that leaves no room for an answer.
    """
    check_split(task, options.split, options.n_shot)
    problems = read_problems(task, folder, options.split)
    asked = {problem.question for problem in problems}
    problems = problems[: options.max_samples]
    shots = []
    if options.n_shot and task.shots_split:
        usable = [shot for shot in read_problems(task, folder, task.shots_split) if shot.question not in asked]
        shots = usable[: options.n_shot]
    prompts, shown = _prompts(task, template, shots, problems, options)
    answers = {variant: answer(prompts) for variant, answer in answerers.items()}
    return _result(task, template, options, problems, prompts, shown, answers, dict(model or {}))


def _prompts(
    task: GenerationTask,
    template: ChatTemplate,
    shots: Sequence[Problem],
    problems: Sequence[Problem],
    options: GenerativeOptions,
) -> tuple[list[list[int]], int]:
    """(prompts, worked examples in them): as many as leave room for the longest answer."""
    prompt, longest = task.prompts[options.lang], options.room or options.max_new_tokens
    for count in range(len(shots), -1, -1):
        opening: list[Turn] = []
        for shot in shots[:count]:
            answer = prompt.answer.replace("{number}", shot.written).replace("{solution}", shot.solution)
            opening += [Turn("user", prompt.question.replace("{question}", shot.question)), Turn("assistant", answer)]
        prompts = [
            template.encode_prompt(
                (*opening, Turn("user", prompt.question.replace("{question}", problem.question))), options.thinking
            )
            for problem in problems
        ]
        if max(map(len, prompts)) + longest <= options.max_tokens:
            return prompts, count
    raise UserError(
        f"{task.title}: the longest question and an answer of {longest} tokens do not fit into the "
        f"model's context of {options.max_tokens}. Give a smaller --max_new_tokens."
    )


def _result(
    task: GenerationTask,
    template: ChatTemplate,
    options: GenerativeOptions,
    problems: list[Problem],
    prompts: list[list[int]],
    shown: int,
    answers: Mapping[str, list[Generation]],
    model: dict[str, Any],
) -> GenerativeResult:
    records: list[dict[str, Any]] = []
    for row, problem in enumerate(problems):
        digest = hashlib.sha256(np.array(prompts[row], dtype=np.int64).tobytes()).hexdigest()
        record: dict[str, Any] = {"source": problem.source, "question": problem.question, "reference": problem.written}
        record |= {"prompt_ids_sha256": digest, "prompt_tokens": len(prompts[row]), "shots": shown}
        for variant, generations in answers.items():
            record[variant] = _read(task, template, options.thinking, generations[row], problem)
        records.append(record)
    comparisons = {}
    if {"base", "tuned"} <= answers.keys():
        comparisons[headline(task.scorer)] = _compared(task, records)
    asked = options.n_shot if task.shots_split else 0
    notes = [] if shown == asked else [f"{options.n_shot} worked examples were asked for, {shown} are shown."]
    notes += _unfinished(records, answers)
    report = EvalReport(
        task=f"{task.title} {options.split}",
        model=model,
        settings={
            "benchmark": task.name,
            "version": task.version,
            "scorer": task.scorer,
            "split": options.split,
            "n_shot": shown,
            "lang": options.lang,
            "thinking": options.thinking,
            "max_new_tokens": options.max_new_tokens,
            "thinking_budget": options.thinking_budget,
        },
        n=len(problems),
        metrics={variant: _metrics(task, records, variant) for variant in answers},
        comparisons=comparisons,
        headline=headline(task.scorer),
        notes=tuple(notes),
    )
    return GenerativeResult(report, records)


def _unfinished(records: Sequence[dict[str, Any]], variants: Iterable[str]) -> Iterator[str]:
    """How many answers never began, because the thinking was cut off."""
    for variant in variants:
        given = [record[variant] for record in records]
        count = sum(not answer["stopped"] and not answer["answer"] for answer in given)
        if count:
            yield (
                f"{variant}: {count} of {len(given)} answers were cut off while still thinking, and are wrong. "
                "Give a larger --max_new_tokens, a --thinking_budget, or --think_chain false."
            )


def _compared(task: GenerationTask, records: Sequence[dict[str, Any]]) -> Comparison:
    """Tuned against base: McNemar's exact test of right and wrong, the normal approximation of shares of words."""
    before, after = (np.array([value_of(record[variant]) for record in records]) for variant in ("base", "tuned"))
    difference = mean_metric(after - before)
    if task.scorer == "f1":
        p_value = normal_p(difference.value, difference.standard_error)
    else:
        wins, losses = (int((after - before == sign).sum()) for sign in (1, -1))
        p_value = mcnemar(losses, wins)
    return compare(float(before.mean()), float(after.mean()), difference.standard_error, p_value)


def _read(
    task: GenerationTask, template: ChatTemplate, thinking: bool | None, generation: Generation, problem: Problem
) -> dict[str, Any]:
    """What one answer says. A reasoning that never ends leaves no answer, and so is wrong."""
    reasoning, text, _ = template.decode_answer(generation.ids, thinking)
    return {
        "answer": text,
        "reasoning": reasoning,
        **score_answer(task.scorer, text, problem.references, problem.number),
        "stopped": generation.stopped,
        "tokens": len(generation.ids),
    }


def _metrics(task: GenerationTask, records: Sequence[dict[str, Any]], variant: str) -> dict[str, Metric]:
    given = [record[variant] for record in records]
    metrics = {headline(task.scorer): mean_metric([value_of(answer) for answer in given])}
    if task.scorer == "number":
        metrics[NUMBERS] = mean_metric([float(answer["number"] is not None) for answer in given])
    else:
        metrics |= {
            name: mean_metric([float(answer[key]) for answer in given])
            for name, key in ((EXACT, "exact"), (CONTAINS, "contains"), (F1, F1))
            if name not in metrics
        }
    return {**metrics, STOPPED: mean_metric([float(answer["stopped"]) for answer in given])}
