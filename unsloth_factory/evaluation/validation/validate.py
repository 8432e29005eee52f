"""Base and tuned model side by side on held-out samples, from one load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.evaluation.validation.answers import BERTSCORE, Answer, Sample, badness, problems, read_answer
from unsloth_factory.evaluation.validation.causes import Evidence, likely_causes
from unsloth_factory.evaluation.validation.measures import (
    Measure,
    comparisons,
    complete,
    corpus_details,
    field_table,
    library_notes,
    measures,
    metrics,
    with_similarity,
)
from unsloth_factory.evaluation.validation.references import Losses
from unsloth_factory.inference.generate import Generation, Progress, generate
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.inference.perplexity import AnswerLoss
from unsloth_factory.inference.sampling import GREEDY, Sampling
from unsloth_factory.knowledge import DomainPack
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.scoring import normalize_answer
from unsloth_factory.scoring.bertscore import BertScorer
from unsloth_factory.scoring.labels import detect_labels, label_advice

WORST = 5
"""Samples shown with their problems."""


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What is asked, and how."""

    samples: Sequence[Sample]
    template: ChatTemplate
    thinking: bool | None = None
    """Mode of the prompts, as trained."""
    pack: DomainPack | None = None
    max_new_tokens: int = 512
    sampling: Sampling = GREEDY
    batch_size: int = 8
    similarity: BertScorer | None = None
    """Compares answers with references by the vectors of an encoder."""


@dataclass(frozen=True)
class ValidationResult:
    """The report, and one record a sample with both answers."""

    report: EvalReport
    records: list[dict[str, Any]]


Answerer = Callable[[Sequence[list[int]], Questions, "Progress | None"], list[Generation]]
"""(prompts, settings, progress) -> one answer a prompt."""


def model_answerers(loaded: LoadedModel, variants: Sequence[str]) -> dict[str, Answerer]:
    """What answers for each variant of one loaded model; "base" switches the adapter off."""

    def answerer(variant: str) -> Answerer:
        def answer(
            prompts: Sequence[list[int]], questions: Questions, on_progress: Progress | None
        ) -> list[Generation]:
            with loaded.adapter_disabled() if variant == "base" else nullcontext():
                return generate(
                    loaded,
                    prompts,
                    stop_ids=questions.template.stop_ids,
                    max_new_tokens=questions.max_new_tokens,
                    sampling=questions.sampling,
                    batch_size=questions.batch_size,
                    on_progress=on_progress,
                )

        return answer

    return {variant: answerer(variant) for variant in variants}


def gguf_answerer(path: Path, check: Callable[[LlamaCpp], None]) -> Answerer:
    """What answers with a GGUF file; it is open only while it answers. `check` may refuse the opened file."""

    def answer(prompts: Sequence[list[int]], questions: Questions, on_progress: Progress | None) -> list[Generation]:
        made = []
        sampling = questions.sampling
        with LlamaCpp(path) as model:
            check(model)
            for prompt in prompts:
                made.append(
                    model.generate(
                        prompt,
                        questions.max_new_tokens,
                        questions.template.stop_ids,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        top_k=sampling.top_k,
                        seed=sampling.seed,
                    )
                )
                if on_progress:
                    on_progress(len(made), len(prompts))
        return made

    return answer


def validate(
    answerers: Mapping[str, Answerer],
    questions: Questions,
    *,
    max_positions: int,
    losses: Mapping[str, Losses] | None = None,
    model: dict[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> ValidationResult:
    """Answer every sample with each variant, score the answers and compare.

    Args:
        answerers: variant -> what answers; with "base" and "tuned" the report compares them.
        questions: Samples, template, thinking mode, domain pack and generation settings.
        max_positions: The model's context, tokens; samples that do not fit are left out, and it says so.
        losses: variant -> what measures how surprised it is by the references; without it there is no perplexity.
        model: Path, adapter, engine and so on, for the report.
        on_progress: Called with (answers done, all), over all variants.

    Raises:
        UserError: There is no sample to answer.
    """
    prompts = [questions.template.encode_prompt(sample.prompt, questions.thinking) for sample in questions.samples]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < max_positions]
    if not fitting:
        raise UserError(
            f"No validation sample fits the model's context of {max_positions} tokens."
            if prompts
            else "There is no validation sample with an answer to compare with. Give some with --dataset."
        )
    samples = [questions.samples[i] for i in fitting]
    answers: dict[str, list[Answer]] = {}
    measured: dict[str, dict[str, Measure]] = {}
    surprises: dict[str, Sequence[AnswerLoss | None]] = {}
    references = [sample.reference for sample in samples]
    labels = detect_labels(references)
    for number, (variant, answer) in enumerate(answerers.items()):
        progress = _shifted(on_progress, number, len(answerers), len(samples))
        made = answer([prompts[i] for i in fitting], questions, progress)
        surprises[variant] = losses[variant](samples) if losses else [None] * len(samples)
        answers[variant] = [
            complete(
                read_answer(generation, sample, questions.template, questions.thinking, questions.pack),
                sample,
                loss,
                labels,
            )
            for generation, sample, loss in zip(made, samples, surprises[variant], strict=True)
        ]
        if questions.similarity:
            answers[variant] = with_similarity(answers[variant], references, questions.similarity)
        measured[variant] = measures(answers[variant], surprises[variant], references, labels)
    notes = library_notes()
    if questions.similarity:
        notes.append(f"{BERTSCORE}: {questions.similarity.signature}.")
    if labels:
        advice = label_advice([normalize_answer(reference) for reference in references])
        notes.append(f"A label task ({len(labels)} labels: {', '.join(labels)}); {advice}")
    if len(fitting) < len(prompts):
        notes.append(f"{len(prompts) - len(fitting)} samples were left out: longer than the model's context.")
    report = _report(questions, samples, answers, measured, notes)
    judged = "tuned" if "tuned" in answers else next(iter(answers))
    seen = Evidence(samples, answers[judged], questions.max_new_tokens, surprises[judged], report.comparisons)
    causes = [asdict(cause) for cause in likely_causes(seen)]
    report = replace(report, model=dict(model or {}), details={"causes": causes, **report.details})
    return ValidationResult(report, _records(samples, answers))


def _shifted(on_progress: Progress | None, number: int, variants: int, samples: int) -> Progress | None:
    if on_progress is None:
        return None
    return lambda done, _: on_progress(number * samples + done, variants * samples)


def _report(
    questions: Questions,
    samples: Sequence[Sample],
    answers: Mapping[str, list[Answer]],
    measured: Mapping[str, Mapping[str, Measure]],
    notes: list[str],
) -> EvalReport:
    both = {"base", "tuned"} <= measured.keys()
    return EvalReport(
        task="validation",
        model={},
        settings={
            "thinking": questions.thinking,
            "domain": questions.pack.name if questions.pack else None,
            "max_new_tokens": questions.max_new_tokens,
            "temperature": questions.sampling.temperature,
            "chat_template_sha256": questions.template.sha256,
        },
        n=len(samples),
        metrics={variant: metrics(values) for variant, values in measured.items()},
        comparisons=comparisons(measured["base"], measured["tuned"]) if both else {},
        headline="exact match",
        notes=tuple(notes),
        details={
            "corpus": corpus_details(samples, answers),
            "json_fields": field_table(samples, answers),
            "rules_broken": {variant: _rules(given) for variant, given in answers.items()},
            "worst": list(_worst(samples, answers)),
        },
    )


def _rules(answers: Sequence[Answer]) -> dict[str, int]:
    """Rule -> answers that break it."""
    counts: dict[str, int] = {}
    for answer in answers:
        for rule in {violation["rule_id"] for violation in answer.violations}:
            counts[rule] = counts.get(rule, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _worst(samples: Sequence[Sample], answers: Mapping[str, list[Answer]]) -> Iterator[dict[str, Any]]:
    """The worst answers of the tuned model (or of the only one), beside the others."""
    judged = answers.get("tuned") or next(iter(answers.values()))
    order = sorted(range(len(samples)), key=lambda i: badness(judged[i]), reverse=True)
    for i in order[:WORST]:
        yield {
            "source": samples[i].source,
            "question": samples[i].question,
            "reference": samples[i].reference,
            "problems": problems(judged[i]),
            **{variant: given[i].text for variant, given in answers.items()},
        }


def _records(samples: Sequence[Sample], answers: Mapping[str, list[Answer]]) -> list[dict[str, Any]]:
    return [
        {
            "source": sample.source,
            "question": sample.question,
            "reference": sample.reference,
            **_earlier(sample),
            **{variant: _record(given[i]) for variant, given in answers.items()},
        }
        for i, sample in enumerate(samples)
    ]


def _earlier(sample: Sample) -> dict[str, Any]:
    """The turns before the question, for whoever judges its answer; nothing where it opens the conversation."""
    turns = [{"role": turn.role, "content": turn.content} for turn in sample.prompt if turn.role != "system"]
    return {"earlier": turns[:-1]} if len(turns) > 1 else {}


def _record(answer: Answer) -> dict[str, Any]:
    return {
        "answer": answer.text,
        "reasoning": answer.reasoning,
        "stopped": answer.stopped,
        "tokens": answer.tokens,
        "leaked": list(answer.leaked),
        "violations": list(answer.violations),
        "scores": answer.scores,
    }
