"""The types of a domain pack. All frozen, all plain data; `loader.py` reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["critical", "major", "minor"]
SEVERITIES: tuple[Severity, ...] = ("critical", "major", "minor")


class PackError(ValueError):
    """A pack file is wrong or unknown. The message names file, section, entry and field, and what is allowed."""


@dataclass(frozen=True)
class Term:
    """A word of the field and the other ways in which people write it."""

    canonical: str
    variants: tuple[str, ...] = ()
    english: str = ""
    """English name; counted by the scores, never used as a replacement."""


@dataclass(frozen=True)
class Relation:
    """A kind of association and the words with which a question asks for it."""

    name: str
    cues: tuple[str, ...]
    """Such as 症状, 表现; the first one is the relation's name in the pack's language."""


@dataclass(frozen=True)
class Association:
    """What a good answer about a condition mentions."""

    condition: str
    relation: str
    expects: tuple[str, ...]
    """The expected words, each in its preferred wording."""
    accepts: tuple[tuple[str, ...], ...]
    """For each expected word all wordings that count, the preferred one first (`a|b|c` in the YAML)."""


@dataclass(frozen=True)
class Example:
    """An answer (to a question, where that matters) which a rule must catch or let pass."""

    answer: str
    question: str = ""


@dataclass(frozen=True)
class SafetyRule:
    """What an answer must not advise (`forbid`), or must mention (`require`). Patterns are regular expressions.

    Exactly one of `forbid` and `require` is given. Patterns name the thing itself: negation, questions and refuted
    advice are understood by `scoring.rules`, not written into the pattern.
    """

    id: str
    severity: Severity
    description: str
    forbid: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    """At least one of these must be said, when the rule applies."""
    when: tuple[str, ...] = ()
    """The rule applies only if question or answer speaks of one of these; empty: always (forbid rules only)."""
    unless: tuple[str, ...] = ()
    """A sentence with one of these is excused (forbid); an answer with one of these is excused (require)."""
    violates: tuple[Example, ...] = ()
    allows: tuple[Example, ...] = ()


@dataclass(frozen=True)
class DomainPack:
    """All that is known of one field."""

    name: str
    title: str
    language: str
    system_prompt: str
    terms: tuple[Term, ...]
    relations: tuple[Relation, ...]
    associations: tuple[Association, ...]
    rules: tuple[SafetyRule, ...]
    protected_words: tuple[str, ...] = ()
    """Words in which a variant must not be replaced, such as 中风险 (which contains 中风)."""
