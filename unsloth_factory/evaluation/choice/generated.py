"""Multiple choice by what the model answers freely: the letter is read from the answer part, never from the thinking.

Slower than log-probabilities and, with a model that does not keep to the form, noisier; but it is what a user sees, and
the only way that lets a model think before it chooses. An answer without one single letter is wrong, and counted apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.evaluation.averages import (
    MACRO,
    accuracy_metrics,
    compare_accuracies,
    constant_scores,
    mean_metric,
)
from unsloth_factory.evaluation.choice.benchmark import Benchmark, Subject, select_subjects
from unsloth_factory.evaluation.choice.letters import chosen_letter
from unsloth_factory.evaluation.choice.prompts import PromptMaker, SubjectPrompts, question_record
from unsloth_factory.evaluation.choice.questions import Question
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, ChoiceResult, checked_options, read_subject
from unsloth_factory.evaluation.generated.generative import STOPPED, Answerer
from unsloth_factory.evaluation.report import EvalReport, Metric
from unsloth_factory.inference.generate import Generation

PARSED = "answers with one letter"
UNPARSED = "none"
"""What stands in the place of a letter."""


@dataclass(frozen=True)
class _Asked:
    """One subject and what was answered. `answers`: variant -> one record a question."""

    subject: Subject
    shots: int
    questions: list[Question]
    prompts: SubjectPrompts
    answers: dict[str, list[dict[str, Any]]]

    def correct(self, variant: str) -> np.ndarray:
        picked = [given["choice"] for given in self.answers[variant]]
        return np.array([float(a == q.answer) for a, q in zip(picked, self.questions, strict=True)])


def evaluate_choices_generated(
    maker: PromptMaker,
    folder: Path,
    answerers: Mapping[str, Answerer],
    options: ChoiceOptions,
    *,
    room: int,
    settings: Mapping[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> ChoiceResult:
    """Ask every question of a benchmark of multiple choice, and read the letter from the answer.

    Args:
        maker: Benchmark, template, language and thinking mode; its mode is "generate".
        folder: The benchmark's data.
        answerers: variant -> answers; with "base" and "tuned" the report compares them.
        options: What is asked.
        room: Tokens of the longest answer: so much of the context is left free.
        settings: What else the report should say of the way of answering.
        model: Path, adapter, engine and so on, for the report.

    Raises:
        UserError: Files or subjects that are missing or wrong; an answer that fills the context.
    """
    benchmark = maker.benchmark
    options = checked_options(benchmark, options)
    left = options.max_tokens - room
    if left < 1:
        raise UserError(
            f"{benchmark.title}: an answer of {room} tokens fills the model's context of {options.max_tokens}. "
            "Give a smaller --max_new_tokens or --thinking_budget."
        )
    asked = []
    for subject in select_subjects(benchmark, folder, options.split, options.subjects):
        shots, questions = read_subject(benchmark, folder, subject, options)
        asked.append(_Asked(subject, len(shots), questions, maker.subject(subject, shots, questions, left), {}))
    prompts = [prompt.ids for item in asked for prompt in item.prompts.prompts]
    for variant, answer in answerers.items():
        given = iter(answer(prompts))
        for item in asked:
            item.answers[variant] = [_read(maker, question, next(given)) for question in item.questions]
    return _result(maker, options, asked, dict(settings or {}), dict(model or {}))


def _read(maker: PromptMaker, question: Question, generation: Generation) -> dict[str, Any]:
    assert maker.template is not None
    reasoning, text, _ = maker.template.decode_answer(generation.ids, maker.thinking)
    return {
        "answer": text,
        "reasoning": reasoning,
        "choice": chosen_letter(text, maker.benchmark.letters, question.options),
        "stopped": generation.stopped,
        "tokens": len(generation.ids),
    }


def _result(
    maker: PromptMaker, options: ChoiceOptions, asked: list[_Asked], settings: dict[str, Any], model: dict[str, Any]
) -> ChoiceResult:
    benchmark, variants, subjects = maker.benchmark, list(asked[0].answers), [item.subject for item in asked]
    known = options.split in benchmark.scored_splits
    correct = {v: {item.subject.name: item.correct(v) for item in asked} for v in variants} if known else {}
    report = EvalReport(
        task=f"{benchmark.title} {options.split}, generated answers",
        model=model,
        settings={
            "benchmark": benchmark.name,
            "version": benchmark.version,
            "split": options.split,
            "n_shot": options.n_shot,
            "lang": maker.lang,
            "choice_mode": "generate",
            "chat_template": True,
            "shots_as": benchmark.shots_as,
            "thinking": maker.thinking,
            **settings,
        },
        n=sum(len(item.questions) for item in asked),
        metrics={v: _metrics(asked, v, subjects, correct.get(v)) for v in variants},
        comparisons=(
            compare_accuracies(subjects, correct["base"], correct["tuned"])
            if {"base", "tuned"} <= correct.keys()
            else {}
        ),
        headline=MACRO if known else "",
        notes=tuple(_notes(benchmark, asked, variants)),
        details=_details(asked, variants, benchmark.letters, correct),
    )
    records = [record for item in asked for record in _records(item)]
    return ChoiceResult(report, records, {} if known else {v: _submission(asked, v) for v in variants})


def _metrics(
    asked: list[_Asked], variant: str, subjects: list[Subject], correct: Mapping[str, np.ndarray] | None
) -> dict[str, Metric]:
    given = [answer for item in asked for answer in item.answers[variant]]
    return {
        **(accuracy_metrics(subjects, correct) if correct else {}),
        PARSED: mean_metric([float(answer["choice"] is not None) for answer in given]),
        STOPPED: mean_metric([float(answer["stopped"]) for answer in given]),
    }


def _details(
    asked: list[_Asked],
    variants: Sequence[str],
    letters: Sequence[str],
    correct: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, Any]:
    counts = {
        variant: Counter(answer["choice"] or UNPARSED for item in asked for answer in item.answers[variant])
        for variant in variants
    }
    details: dict[str, Any] = {
        "chance": 1 / len(letters),
        "chosen_letters": {v: {letter: counts[v][letter] for letter in (*letters, UNPARSED)} for v in variants},
        "unparsed": {variant: counts[variant][UNPARSED] for variant in variants},
        "subjects": {
            item.subject.name: {
                "n": len(item.questions),
                "shots": item.prompts.shots,
                "group": item.subject.group,
                **{variant: mean_metric(values[item.subject.name]).value for variant, values in correct.items()},
                "standard_errors": {
                    v: mean_metric(rows[item.subject.name]).standard_error for v, rows in correct.items()
                },
                "unparsed": {v: sum(answer["choice"] is None for answer in item.answers[v]) for v in variants},
            }
            for item in asked
        },
    }
    if correct:
        answers = {item.subject.name: [str(q.answer) for q in item.questions] for item in asked}
        details["always_the_same_letter"] = constant_scores([item.subject for item in asked], answers, letters)
    return details


def _notes(benchmark: Benchmark, asked: list[_Asked], variants: Sequence[str]) -> Iterator[str]:
    for variant in variants:
        given = [answer for item in asked for answer in item.answers[variant]]
        unparsed = [answer for answer in given if answer["choice"] is None]
        if unparsed:
            endless = sum(not answer["stopped"] for answer in unparsed)
            yield (
                f"{variant}: {len(unparsed)} of {len(given)} answers name no single letter and count as wrong"
                + (f"; {endless} of these were cut off (--max_new_tokens, --thinking_budget)." if endless else ".")
            )
    shortened = [item.subject.name for item in asked if item.prompts.shots < item.shots]
    if shortened:
        yield f"Fewer worked examples than asked for fit in {len(shortened)} subjects: {', '.join(shortened[:5])}"
    cut = sum(item.prompts.cut for item in asked)
    if cut:
        yield f"{cut} questions leave no room for the answer in the model's context: their beginning was cut."
    if len(asked) < len(benchmark.subjects):
        known = len(benchmark.subjects)
        yield f"{len(asked)} of {known} subjects: averages over a part do not compare with those of the whole."


def _records(item: _Asked) -> Iterator[dict[str, Any]]:
    for row, (question, prompt) in enumerate(zip(item.questions, item.prompts.prompts, strict=True)):
        record = question_record(question, prompt, item.prompts.shots)
        for variant, answers in item.answers.items():
            record[variant] = dict(answers[row])
            if question.answer is not None:
                record[variant]["correct"] = answers[row]["choice"] == question.answer
        yield record


def _submission(asked: list[_Asked], variant: str) -> dict[str, dict[str, str]]:
    """C-Eval's official format; an answer without a letter is an empty text."""
    return {
        item.subject.name: {
            question.id: given["choice"] or ""
            for question, given in zip(item.questions, item.answers[variant], strict=True)
        }
        for item in asked
    }
