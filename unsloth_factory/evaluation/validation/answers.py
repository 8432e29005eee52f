"""One generated answer against its reference and its field's pack: numbers, each with a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, Turn
from unsloth_factory.evaluation.report import Direction
from unsloth_factory.inference.generate import Generation
from unsloth_factory.knowledge import DomainPack
from unsloth_factory.scoring import (
    association_coverage,
    control_token_leak,
    exact_match,
    repetition_loop,
    rule_violations,
    term_coverage,
)
from unsloth_factory.scoring.format import Thinking, language_switch, repeated_ngram, thinking_state
from unsloth_factory.scoring.labels import AVERAGES

SEVERITIES = ("critical", "major", "minor")
PERPLEXITY = "reference perplexity"
BERTSCORE = "BERTScore F1"
DIRECTIONS: Mapping[str, Direction] = {
    "exact match": "higher",
    "label accuracy": "higher",
    **dict.fromkeys(AVERAGES, "higher"),
    "JSON object found": "higher",
    "JSON field accuracy": "higher",
    "JSON field F1": "higher",
    "token F1": "higher",
    "BLEU-4": "higher",
    "chrF": "higher",
    "ROUGE-1": "higher",
    "ROUGE-2": "higher",
    "ROUGE-L": "higher",
    BERTSCORE: "higher",
    PERPLEXITY: "lower",
    "term coverage": "higher",
    "association coverage": "higher",
    **{f"{severity} violations per answer": "lower" for severity in SEVERITIES},
    "control-token leaks": "lower",
    "stopped by itself": "higher",
    "empty answers": "lower",
    "repetition loops": "lower",
    "broken thinking": "lower",
    "language switches": "lower",
    "answer tokens": "neutral",
}
"""Every metric of a validation, in the order of the table. Shares are means of 0/1 over the answers.

`read_answer` knows those that need the answer alone; the others are None until `measures.complete` fills them in.
"""
FAULTS = ("control-token leaks", "empty answers", "repetition loops", "broken thinking", "language switches")
BINARY = ("exact match", "label accuracy", "JSON object found", "stopped by itself", *FAULTS)


@dataclass(frozen=True)
class Sample:
    """What is asked, and the answer that a person wrote."""

    prompt: tuple[Turn, ...]
    reference: str
    source: str
    reasoning: str | None = None
    """What the person thought before the answer, if it was written down."""

    @property
    def question(self) -> str:
        """The last user turn."""
        return next((turn.content for turn in reversed(self.prompt) if turn.role == "user"), "")


@dataclass(frozen=True)
class Answer:
    """A generated answer, taken apart."""

    text: str
    reasoning: str | None
    leaked: tuple[str, ...]
    """Control tokens in it."""
    stopped: bool
    tokens: int
    loop: str | None
    """Text that it repeats again and again."""
    violations: tuple[dict[str, Any], ...]
    """rule_id, severity, sentence and the matched words."""
    scores: dict[str, float | None]
    """Metric -> value; None where the question says nothing about it (no term in the reference, say)."""
    thinking: Thinking = "fine"
    switch: str | None = None
    """How it leaves the language of the reference, in words."""
    remarks: tuple[str, ...] = ()
    """What is wrong with it as JSON or as a label, in words."""


def samples_of(conversations: Sequence[Conversation], system: str | None) -> list[Sample]:
    """One sample a conversation: everything before its last assistant turn is the prompt.

    Args:
        conversations: As loaded; those without an assistant turn are left out.
        system: Put before conversations that have no system turn of their own.
    """
    samples = []
    for conversation in conversations:
        turns = conversation.turns
        last = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
        if last == 0:
            continue
        opening = (Turn("system", system),) if system and turns[0].role != "system" else ()
        samples.append(
            Sample((*opening, *turns[:last]), turns[last].content, conversation.source, turns[last].reasoning)
        )
    return samples


def read_answer(
    generation: Generation, sample: Sample, template: ChatTemplate, thinking: bool | None, pack: DomainPack | None
) -> Answer:
    """Decode and score one generation."""
    reasoning, text, leaked = template.decode_answer(generation.ids, thinking)
    # Those that were generated as tokens, and those that were spelt out of ordinary ones.
    leaked += control_token_leak(text, template.control_tokens)
    loop = repetition_loop(text)
    repeated = loop.unit if loop else repeated_ngram(text)
    state, switch = thinking_state(text, reasoning, thinking), language_switch(text, sample.reference)
    violations = [asdict(v) for v in rule_violations(text, pack, sample.question)] if pack else []
    scores: dict[str, float | None] = {
        "exact match": float(exact_match(text, sample.reference)),
        "term coverage": term_coverage(text, sample.reference, pack).share if pack else None,
        "association coverage": association_coverage(sample.question, text, pack).share if pack else None,
        "control-token leaks": float(bool(leaked)),
        "stopped by itself": float(generation.stopped),
        "empty answers": float(not text),
        "repetition loops": float(repeated is not None),
        "broken thinking": float(state != "fine"),
        "language switches": float(switch is not None),
        "answer tokens": float(len(generation.ids)),
    }
    for severity in SEVERITIES:
        count = sum(violation["severity"] == severity for violation in violations)
        scores[f"{severity} violations per answer"] = float(count) if pack else None
    return Answer(
        text=text,
        reasoning=reasoning,
        leaked=tuple(leaked),
        stopped=generation.stopped,
        tokens=len(generation.ids),
        loop=repeated,
        violations=tuple(violations),
        scores={name: scores.get(name) for name in DIRECTIONS},
        thinking=state,
        switch=switch,
    )


def problems(answer: Answer) -> list[str]:
    """What is wrong with an answer, in words, the worst first."""
    found = [f"{v['severity']} rule {v['rule_id']}: {v['sentence']}" for v in _by_severity(answer.violations)]
    if answer.leaked:
        found.append(f"control tokens in the answer: {' '.join(answer.leaked)}")
    if not answer.text:
        found.append("no answer" + (" after the reasoning" if answer.reasoning else ""))
    if not answer.stopped:
        found.append(f"cut off after {answer.tokens} tokens")
    if answer.loop:
        found.append(f"repeats {answer.loop!r}")
    if answer.thinking != "fine" and answer.text:
        found.append(f"thinking: {answer.thinking}")
    if answer.switch:
        found.append(f"language: {answer.switch}")
    found.extend(answer.remarks)
    return found


def badness(answer: Answer) -> tuple[float, ...]:
    """Sort key: larger is worse."""
    by_severity = [sum(v["severity"] == severity for v in answer.violations) for severity in SEVERITIES]
    coverage = [answer.scores[name] for name in ("term coverage", "association coverage")]
    missed = sum(1 - value for value in coverage if value is not None)
    broken = sum(answer.scores[name] or 0 for name in FAULTS) + (not answer.stopped) + bool(answer.remarks)
    unlike = 1 - (answer.scores["token F1"] or 0)
    return (*by_severity, broken, missed, 1 - (answer.scores["exact match"] or 0), unlike)


def _by_severity(violations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(violations, key=lambda violation: SEVERITIES.index(violation["severity"]))
