"""How much of what should be said is said: the terms of a reference, the associations of a condition."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from unsloth_factory.knowledge import Association, DomainPack, TermNormalizer
from unsloth_factory.knowledge.normalizer import WordFinder, word_pattern
from unsloth_factory.scoring.negation import is_negated

# Here the answer is right to say "avoid X": the word counts whether negated or not.
WARNINGS = ("contraindication", "exception", "complication")


@dataclass(frozen=True)
class Coverage:
    """Which expected words an answer mentions. Nothing expected: `share` is None, so that it stays out of means."""

    found: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def share(self) -> float | None:
        """Found words as a share of the expected ones, 0 to 1."""
        expected = len(self.found) + len(self.missing)
        return len(self.found) / expected if expected else None


def term_coverage(answer: str, reference: str, pack: DomainPack) -> Coverage:
    """Which of the pack's terms in the reference are in the answer too, in any wording (variant or English name)."""
    finder = _term_finder(pack)
    expected = dict.fromkeys(found.wording.becomes for found in finder.find(reference))
    given = {found.wording.becomes for found in finder.find(answer)}
    return _coverage(expected, given)


def association_coverage(question: str, answer: str, pack: DomainPack) -> Coverage:
    """Which of the words that the pack expects for the question's conditions the answer mentions.

    A question that asks for one relation (症状, 检查 …) is held to that relation's words, any other to all of the
    condition's. A negated word (不需要就医) does not count, except where warnings are the point.
    """
    normalizer = _normalizer(pack)
    answer = normalizer.normalize(answer)[0]
    expected: dict[str, None] = {}
    given: set[str] = set()
    for association in asked_associations(question, pack):
        for words in association.accepts:
            name = f"{association.condition}/{association.relation}/{words[0]}"
            expected[name] = None
            wordings = {*words, *(normalizer.normalize(word)[0] for word in words)}
            if _says(answer, wordings, association.relation in WARNINGS):
                given.add(name)
    coverage = _coverage(expected, given)
    return Coverage(*(tuple(name.rsplit("/", 1)[1] for name in names) for names in (coverage.found, coverage.missing)))


def asked_associations(question: str, pack: DomainPack) -> list[Association]:
    """The associations that a question is about: by the conditions it names (longest wording), then by relation."""
    finder = _term_finder(pack)
    named = {found.wording.becomes for found in finder.find(question)}
    candidates = [association for association in pack.associations if association.condition in named]
    asked = {relation.name for relation in pack.relations if any(cue in question for cue in relation.cues)}
    return [association for association in candidates if association.relation in asked] or candidates


@lru_cache(maxsize=8)
def _normalizer(pack: DomainPack) -> TermNormalizer:
    return TermNormalizer(pack)


@lru_cache(maxsize=8)
def _term_finder(pack: DomainPack) -> WordFinder:
    wordings = [(term.canonical, term.canonical) for term in pack.terms]
    wordings += [(variant, term.canonical) for term in pack.terms for variant in term.variants]
    wordings += [(term.english, term.canonical) for term in pack.terms if term.english]
    wordings += [(association.condition, association.condition) for association in pack.associations]
    return WordFinder(wordings)


def _says(answer: str, wordings: Iterable[str], even_negated: bool) -> bool:
    matches = (match for wording in wordings for match in re.finditer(word_pattern(wording), answer))
    return any(even_negated or not is_negated(answer, *match.span()) for match in matches)


def _coverage(expected: Iterable[str], given: set[str]) -> Coverage:
    names = list(expected)
    return Coverage(tuple(name for name in names if name in given), tuple(name for name in names if name not in given))
