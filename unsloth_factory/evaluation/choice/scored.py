"""Multiple choice by log-probabilities: the letter, or the option's text, that the model holds likeliest.

Nothing is generated and nothing is parsed, so that no answer format, sampling or extraction enters the score. Worked
examples come from the benchmark's own split for them and never hold a scored question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UsageError
from unsloth_factory.evaluation.averages import (
    MACRO,
    accuracy_metrics,
    compare_accuracies,
    constant_scores,
    letter_counts,
    mean_metric,
)
from unsloth_factory.evaluation.choice.benchmark import Benchmark, Subject, select_subjects
from unsloth_factory.evaluation.choice.kept_scores import KeptScores
from unsloth_factory.evaluation.choice.prompts import ChoicePrompt, PromptMaker, SubjectPrompts, question_record
from unsloth_factory.evaluation.choice.questions import Question, read_questions
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.inference.distributions import log_softmax
from unsloth_factory.inference.generate import Progress
from unsloth_factory.inference.score import choice_logprobs
from unsloth_factory.model.loaded import LoadedModel

Scorer = Callable[[Sequence[list[int]], Sequence[Sequence[list[int]]]], np.ndarray]
"""(prompts, token ids of their choices) -> log-probabilities, float [n, choices]."""


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """What is scored, and how it is shown."""

    n_shot: int = 5
    split: str = ""
    """Empty for the benchmark's own."""
    subjects: str | None = None
    """By commas; None for all."""
    per_character: bool = False
    """Choose by log-probability per character of the option, so that long options are not at a disadvantage."""
    max_tokens: int = 2**31
    """The model's context, tokens."""


@dataclass(frozen=True)
class ChoiceResult:
    """The report, one record a question, and for a split without answers what is sent to the benchmark's server."""

    report: EvalReport
    records: list[dict[str, Any]]
    submissions: dict[str, dict[str, dict[str, str]]] = field(default_factory=dict)
    """variant -> subject -> question id -> letter."""


@dataclass(frozen=True)
class _Scored:
    """One subject, read, encoded and scored by every variant."""

    subject: Subject
    questions: list[Question]
    prompts: SubjectPrompts
    asked_shots: int
    scores: dict[str, np.ndarray]
    per_character: bool

    def choices(self, variant: str, letters: Sequence[str]) -> list[str]:
        scores = self.scores[variant]
        if self.per_character:
            scores = scores / np.array([[len(option) for option in question.options] for question in self.questions])
        return [letters[index] for index in scores.argmax(axis=1)]

    def correct(self, variant: str, letters: Sequence[str]) -> np.ndarray:
        picked = self.choices(variant, letters)
        return np.array([float(a == q.answer) for a, q in zip(picked, self.questions, strict=True)])


def model_scorers(loaded: LoadedModel, variants: Sequence[str], at_once: int | None = None) -> dict[str, Scorer]:
    """A scorer for each variant of one loaded model; "base" switches the adapter off.

    Args:
        loaded: The model.
        variants: "base", "tuned".
        at_once: Most questions computed together; None: as many as are quickest.
    """

    def tuned(prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> np.ndarray:
        return choice_logprobs(loaded, prompts, choices, at_once=at_once)

    def base(prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> np.ndarray:
        with loaded.adapter_disabled():
            return tuned(prompts, choices)

    return {variant: base if variant == "base" else tuned for variant in variants}


def logits_scorer(tail_logits: Callable[[list[int], int], np.ndarray]) -> Scorer:
    """A scorer from what gives the logits [last, V] after each of the last tokens of a prompt (llama.cpp).

    Prompts go in whole, one after the other, so that what they share at their start is computed once where the engine
    keeps it. A choice of several tokens is read at once behind its prompt.
    """

    def score(prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> np.ndarray:
        return np.array([_by_logits(tail_logits, p, c) for p, c in zip(prompts, choices, strict=True)])

    return score


def _by_logits(
    tail_logits: Callable[[list[int], int], np.ndarray], prompt: list[int], choices: Sequence[list[int]]
) -> list[float]:
    known: dict[tuple[int, ...], np.ndarray] = {}
    totals = []
    for choice in choices:
        before = tuple(choice[:-1])
        if before not in known:
            known[before] = log_softmax(tail_logits([*prompt, *before], len(choice)))
        totals.append(float(known[before][np.arange(len(choice)), choice].sum()))
    return totals


def evaluate(
    maker: PromptMaker,
    folder: Path,
    scorers: Mapping[str, Scorer],
    options: ChoiceOptions,
    *,
    model: dict[str, Any] | None = None,
    kept: Mapping[str, KeptScores] | None = None,
    check: Callable[[Sequence[ChoicePrompt]], None] | None = None,
    on_progress: Progress | None = None,
) -> ChoiceResult:
    """Score a benchmark.

    Args:
        maker: Benchmark, template, language and thinking mode.
        folder: The benchmark's data.
        scorers: variant -> scorer; with "base" and "tuned" the report compares them.
        options: What is scored.
        model: Path, adapter, engine and so on, for the report.
        kept: variant -> scores of an earlier run that was stopped; finished subjects are added.
        check: Called with the prompts of each subject before they are scored.
        on_progress: Called with (subjects done, all).

    Raises:
        UserError: Files or subjects that are missing or wrong.
    """
    benchmark = maker.benchmark
    options = checked_options(benchmark, options)
    subjects = select_subjects(benchmark, folder, options.split, options.subjects)
    # All files are read before the first question is scored: a broken one is found in seconds, not after an hour.
    material = [(subject, *read_subject(benchmark, folder, subject, options)) for subject in subjects]
    scored = []
    for done, (subject, shots, questions) in enumerate(material, start=1):
        prompts = maker.subject(subject, shots, questions, options.max_tokens)
        if check:
            check(prompts.prompts)
        scores = {
            variant: _scores(scorer, subject.name, prompts.prompts, (kept or {}).get(variant))
            for variant, scorer in scorers.items()
        }
        scored.append(_Scored(subject, questions, prompts, len(shots), scores, options.per_character))
        if on_progress:
            on_progress(done, len(subjects))
    return _result(maker, options, scored, dict(model or {}))


def _scores(scorer: Scorer, subject: str, prompts: list[ChoicePrompt], kept: KeptScores | None) -> np.ndarray:
    """Log-probabilities [n, choices], computed unless they are kept."""
    scores = kept.read(subject, prompts) if kept else None
    if scores is None:
        scores = scorer([prompt.ids for prompt in prompts], [prompt.choices for prompt in prompts])
        if kept:
            kept.write(subject, prompts, scores)
    return scores


def checked_options(benchmark: Benchmark, options: ChoiceOptions) -> ChoiceOptions:
    """The options with the benchmark's own split filled in, and no worked examples where there are none."""
    known = (*benchmark.scored_splits, *benchmark.submission_splits)
    options = replace(options, split=options.split or known[0], n_shot=options.n_shot if benchmark.shots_split else 0)
    if options.split not in known:
        raise UsageError(f"--split {options.split}: {benchmark.name} has {', '.join(known)}.")
    if options.split == benchmark.shots_split and options.n_shot:
        raise UsageError(f"--split {options.split} is where the worked examples come from. Give --n_shot 0.")
    return options


def read_subject(
    benchmark: Benchmark, folder: Path, subject: Subject, options: ChoiceOptions
) -> tuple[list[Question], list[Question]]:
    """(worked examples, questions) of a subject; a worked example that is also asked is left out."""
    with_answers = options.split in benchmark.scored_splits
    questions = read_questions(benchmark, folder, subject.name, options.split, with_answers=with_answers)
    if not options.n_shot:
        return [], questions
    asked = {(question.text, frozenset(question.options)) for question in questions}
    shots = read_questions(benchmark, folder, subject.name, benchmark.shots_split)
    return [shot for shot in shots if (shot.text, frozenset(shot.options)) not in asked][: options.n_shot], questions


def _result(maker: PromptMaker, options: ChoiceOptions, scored: list[_Scored], model: dict[str, Any]) -> ChoiceResult:
    benchmark = maker.benchmark
    letters, variants = benchmark.letters, list(scored[0].scores)
    subjects = [item.subject for item in scored]
    known = options.split in benchmark.scored_splits
    correct = {v: {item.subject.name: item.correct(v, letters) for item in scored} for v in variants} if known else {}
    report = EvalReport(
        task=f"{benchmark.title} {options.split}",
        model=model,
        settings={
            "benchmark": benchmark.name,
            "version": benchmark.version,
            "split": options.split,
            "n_shot": options.n_shot,
            "lang": maker.lang,
            "choice_mode": "text_normalized" if options.per_character else maker.mode,
            "chat_template": maker.template is not None,
            "shots_as": benchmark.shots_as if maker.template is not None else "prompt",
            "thinking": maker.thinking if maker.template is not None else None,
        },
        n=sum(len(item.questions) for item in scored),
        metrics={variant: accuracy_metrics(subjects, correct[variant]) if known else {} for variant in variants},
        comparisons=(
            compare_accuracies(subjects, correct["base"], correct["tuned"])
            if {"base", "tuned"} <= correct.keys()
            else {}
        ),
        headline=MACRO,
        notes=tuple(_notes(benchmark, options, scored)),
        details=_details(scored, variants, letters, correct),
    )
    records = [record for item in scored for record in _records(item, letters)]
    return ChoiceResult(report, records, {} if known else {v: _submission(scored, v, letters) for v in variants})


def _details(
    scored: list[_Scored], variants: list[str], letters: Sequence[str], correct: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "chance": 1 / len(letters),
        "chosen_letters": {
            variant: letter_counts([c for item in scored for c in item.choices(variant, letters)], letters)
            for variant in variants
        },
        "subjects": {
            item.subject.name: {
                "n": len(item.questions),
                "shots": item.prompts.shots,
                "group": item.subject.group,
                **{variant: mean_metric(values[item.subject.name]).value for variant, values in correct.items()},
                "standard_errors": {
                    variant: mean_metric(values[item.subject.name]).standard_error
                    for variant, values in correct.items()
                },
            }
            for item in scored
        },
    }
    if correct:
        answers = {item.subject.name: [str(q.answer) for q in item.questions] for item in scored}
        details["always_the_same_letter"] = constant_scores([item.subject for item in scored], answers, letters)
    return details


def _notes(benchmark: Benchmark, options: ChoiceOptions, scored: list[_Scored]) -> Iterator[str]:
    fewer = [item for item in scored if item.asked_shots < options.n_shot]
    if fewer:
        most = max(item.asked_shots for item in fewer)
        yield (
            f"{options.n_shot} worked examples were asked for; {len(fewer)} of {len(scored)} subjects have fewer "
            f"usable ones in {benchmark.shots_split} (at most {most}): all of them were used."
        )
    shortened = [item.subject.name for item in scored if item.prompts.shots < item.asked_shots]
    if shortened:
        yield (
            f"Fewer worked examples than asked for fit into {options.max_tokens} tokens in {len(shortened)} subjects: "
            f"{', '.join(shortened[:5])}{' ...' if len(shortened) > 5 else ''}"
        )
    cut = sum(item.prompts.cut for item in scored)
    if cut:
        yield f"{cut} questions are longer than the context of {options.max_tokens} tokens: their beginning was cut."
    known = len(benchmark.subjects)
    if len(scored) < known:
        yield f"{len(scored)} of {known} subjects: averages over a part do not compare with those of the whole."


def _records(item: _Scored, letters: Sequence[str]) -> Iterator[dict[str, Any]]:
    picked = {variant: item.choices(variant, letters) for variant in item.scores}
    for row, (question, prompt) in enumerate(zip(item.questions, item.prompts.prompts, strict=True)):
        record = question_record(question, prompt, item.prompts.shots)
        for variant, scores in item.scores.items():
            values = [round(float(value), 6) for value in scores[row]]
            record[variant] = {"logprobs": dict(zip(letters, values, strict=True)), "choice": picked[variant][row]}
            if question.answer is not None:
                record[variant]["correct"] = picked[variant][row] == question.answer
        yield record


def _submission(scored: list[_Scored], variant: str, letters: Sequence[str]) -> dict[str, dict[str, str]]:
    """C-Eval's official format: {subject: {question id: letter}}."""
    return {
        item.subject.name: {
            question.id: choice for question, choice in zip(item.questions, item.choices(variant, letters), strict=True)
        }
        for item in scored
    }
