"""A pack's safety rules applied to an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unsloth_factory.knowledge import DomainPack, SafetyRule
from unsloth_factory.scoring.negation import is_asserted, is_negated, sentence_at


@dataclass(frozen=True)
class Violation:
    """One sentence that breaks one rule."""

    rule_id: str
    severity: str
    sentence: str
    """The sentence as written; for a require rule the one that makes the rule apply (of the question if need be)."""
    matched: str
    """The words in it that the pattern found."""


def rule_violations(answer: str, pack: DomainPack, question: str = "") -> list[Violation]:
    """Where an answer breaks the pack's rules; each rule at most once a sentence.

    A forbidden thing counts only if it is advised: not if it is negated (禁止催吐), asked (能不能催吐？) or
    refuted (有人说可以催吐，这是错误的); see `negation.py`. A required thing counts as said only if it is not negated.

    Args:
        answer: The answer without its reasoning part.
        pack: The domain pack.
        question: What was asked; the rules' `when` patterns are looked for in it too.
    """
    return [violation for rule in pack.rules for violation in _violations(rule, answer, question)]


def failed_examples(pack: DomainPack) -> list[str]:
    """Check a pack's rules on their own examples; returns one line for each that behaves otherwise."""
    failures = []
    for rule in pack.rules:
        for expected, examples in ((True, rule.violates), (False, rule.allows)):
            for example in examples:
                if bool(_violations(rule, example.answer, example.question)) != expected:
                    verb = "is not caught" if expected else "is caught"
                    failures.append(f"{pack.name}: rule {rule.id}: {example.answer!r} {verb}")
    return failures


def _violations(rule: SafetyRule, answer: str, question: str) -> list[Violation]:
    if rule.require:
        return _missing(rule, answer, question)
    if rule.when and not any(_mentioned(rule.when, text) for text in (question, answer)):
        return []
    found: dict[str, Violation] = {}
    for match in _matches(rule.forbid, answer):
        sentence = _sentence(answer, match.start())
        if sentence in found or _search(rule.unless, sentence):
            continue
        if is_asserted(answer, *match.span()):
            found[sentence] = Violation(rule.id, rule.severity, sentence, match.group())
    return list(found.values())


def _missing(rule: SafetyRule, answer: str, question: str) -> list[Violation]:
    triggers = [(text, match) for text in (question, answer) if (match := _mentioned(rule.when, text))]
    if not triggers or _search(rule.unless, answer) or _mentioned(rule.require, answer):
        return []
    text, match = triggers[0]
    return [Violation(rule.id, rule.severity, _sentence(text, match.start()), match.group())]


def _mentioned(patterns: Sequence[str], text: str) -> re.Match[str] | None:
    """The first match that is not negated."""
    return next((match for match in _matches(patterns, text) if not is_negated(text, *match.span())), None)


def _matches(patterns: Sequence[str], text: str) -> Iterator[re.Match[str]]:
    for pattern in patterns:
        yield from re.finditer(pattern, text, re.IGNORECASE)


def _search(patterns: Sequence[str], text: str) -> bool:
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in patterns)


def _sentence(text: str, position: int) -> str:
    start, end = sentence_at(text, position)
    return text[start:end].strip()
