"""Score generated answers to questions with one exact number: reasoning is stripped, the answer part alone is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.evaluation.averages import compare, mean_metric
from unsloth_factory.evaluation.generation_task import GenerationTask, Problem, check_split, read_problems
from unsloth_factory.evaluation.numbers import final_number
from unsloth_factory.evaluation.report import EvalReport, Metric
from unsloth_factory.inference.generate import Generation
from unsloth_factory.scoring import mcnemar

Answerer = Callable[[Sequence[list[int]]], list[Generation]]
"""Prompts, token ids -> answers, in their order."""
ACCURACY, STOPPED, NUMBERS = "accuracy", "stopped by itself", "answers with a number"


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
    """Ask every question of each variant and compare the final numbers exactly.

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
    if options.n_shot:
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
            record[variant] = _read(template, options.thinking, generations[row], problem)
        records.append(record)
    correct = {v: np.array([float(record[v]["correct"]) for record in records]) for v in answers}
    comparisons = {}
    if {"base", "tuned"} <= correct.keys():
        difference = mean_metric(correct["tuned"] - correct["base"])
        wins, losses = (int((correct["tuned"] - correct["base"] == sign).sum()) for sign in (1, -1))
        before, after = (float(correct[variant].mean()) for variant in ("base", "tuned"))
        comparisons[ACCURACY] = compare(before, after, difference.standard_error, mcnemar(losses, wins))
    notes = () if shown == options.n_shot else (f"{options.n_shot} worked examples were asked for, {shown} are shown.",)
    report = EvalReport(
        task=f"{task.title} {options.split}",
        model=model,
        settings={
            "benchmark": task.name,
            "version": task.version,
            "split": options.split,
            "n_shot": shown,
            "lang": options.lang,
            "thinking": options.thinking,
            "max_new_tokens": options.max_new_tokens,
            "thinking_budget": options.thinking_budget,
        },
        n=len(problems),
        metrics={variant: _metrics(records, variant) for variant in answers},
        comparisons=comparisons,
        headline=ACCURACY,
        notes=notes,
    )
    return GenerativeResult(report, records)


def _read(template: ChatTemplate, thinking: bool | None, generation: Generation, problem: Problem) -> dict[str, Any]:
    """What one answer says. A reasoning that never ends leaves no answer, and so is wrong."""
    reasoning, text, _ = template.decode_answer(generation.ids, thinking)
    number = final_number(text)
    return {
        "answer": text,
        "reasoning": reasoning,
        "number": None if number is None else str(number),
        "correct": number == problem.number,
        "stopped": generation.stopped,
        "tokens": len(generation.ids),
    }


def _metrics(records: Sequence[dict[str, Any]], variant: str) -> dict[str, Metric]:
    given = [record[variant] for record in records]
    return {
        ACCURACY: mean_metric([float(answer["correct"]) for answer in given]),
        NUMBERS: mean_metric([float(answer["number"] is not None) for answer in given]),
        STOPPED: mean_metric([float(answer["stopped"]) for answer in given]),
    }
