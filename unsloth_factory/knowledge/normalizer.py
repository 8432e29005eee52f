"""Replace the variants of a pack's terms by their canonical form, as whole tokens only.

Chinese has no spaces, so what is "a whole token" is decided by the pack: of all known wordings (canonical forms,
variants, conditions, protected words) that overlap in the text the longest wins, and only what it covers can be
replaced. 心梗 therefore stays as it is inside 急性心梗 when that is a wording of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from unsloth_factory.knowledge.pack import DomainPack

# Control tokens, tags, bracketed roles, URLs, addresses and code are not prose.
UNTOUCHED = re.compile(
    r"<\|[^|<>\s]{1,60}\|>|<｜[^｜<>]{1,60}｜>|</?[A-Za-z_][\w:.-]{0,40}/?>|\[/?(?:INST|SYS|gMASK|MASK|CLS|SEP|PAD|UNK)\]"
    r"|(?:https?|ftp|file)://[^\s，。；、！？）》”\"<>]+|www\.[^\s，。；、！？）》”\"<>]+"
    r"|[\w.+-]+@[\w-]+(?:\.[\w-]+)+|```.*?```|`[^`\n]+`",
    re.DOTALL,
)
CJK = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
SENTENCE_END = re.compile(r"[。！？!?；;\n]|\.(?=\s)")
LATIN = "0-9A-Za-z_\u00c0-\u024f\uff10-\uff19\uff21-\uff3a\uff41-\uff5a"
# Words that open with the character on which many variants end: 高血压病人 is 高血压 + 病人, not 高血压病 + 人.
NEXT_WORDS = (
    "病人",
    "病情",
    "病变",
    "病程",
    "病史",
    "病例",
    "病房",
    "病区",
    "病因",
    "病毒",
    "病理",
    "病灶",
    "病龄",
    "症状",
    "症候",
)
MAX_PASSES = 8


@dataclass(frozen=True)
class Wording:
    """One way to write something and what it becomes; `becomes` equal to `text` only keeps others away."""

    text: str
    becomes: str
    pattern: re.Pattern[str]


@dataclass(frozen=True)
class Found:
    """A wording at one place of a text."""

    start: int
    end: int
    wording: Wording


def word_pattern(word: str) -> str:
    """Regular expression of one wording: Latin edges only at word boundaries, case kept only for abbreviations.

    A wording without any lower-case letter (MI, CT) must be written so; any other matches in any case.
    A hyphen, full stop, apostrophe or @ that joins it to another Latin word is no boundary (MI-24, mi.com).
    """
    body = re.escape(word)
    if any(char.islower() for char in word):
        body = f"(?i:{body})"
    latin = re.compile(f"[{LATIN}]")
    before = f"(?<![{LATIN}])(?<![{LATIN}][-.'’@])" if latin.match(word[0]) else ""
    after = f"(?![{LATIN}])(?![-.'’@][{LATIN}])" if latin.match(word[-1]) else ""
    return f"{before}{body}{after}"


class WordFinder:
    """Finds known wordings in a text: the longest first, none overlapping another."""

    def __init__(self, wordings: Iterable[tuple[str, str]]) -> None:
        """Take pairs (wording, what it becomes); of a wording given twice the first pair counts."""
        table: dict[str, Wording] = {}
        for text, becomes in wordings:
            table.setdefault(text, Wording(text, becomes, re.compile(word_pattern(text))))
        # Two characters are a cheap and sharp filter: few places of a text start like any wording.
        self._by_start: dict[str, list[Wording]] = defaultdict(list)
        for wording in table.values():
            self._by_start[wording.text[:2].lower()].append(wording)
        first = {variant for start in self._by_start for variant in (start[0], start[0].upper())}
        self._first = re.compile("[" + "".join(map(re.escape, sorted(first))) + "]") if first else None

    def find(self, text: str) -> list[Found]:
        """All wordings of `text` in reading order."""
        candidates = sorted(self._candidates(text), key=lambda found: (found.start - found.end, found.start))
        taken = bytearray(len(text))
        chosen = []
        for found in candidates:
            if not any(taken[found.start : found.end]):
                taken[found.start : found.end] = b"\1" * (found.end - found.start)
                chosen.append(found)
        return sorted(chosen, key=lambda found: found.start)

    def _candidates(self, text: str) -> Iterator[Found]:
        if self._first is None:
            return
        untouched: list[tuple[int, int]] | None = None
        for start in (match.start() for match in self._first.finditer(text)):
            for wording in self._by_start.get(text[start : start + 2].lower(), ()):
                if not wording.pattern.match(text, start):
                    continue
                if untouched is None:
                    untouched = [match.span() for match in UNTOUCHED.finditer(text)]
                end = start + len(wording.text)
                if not any(a < end and start < b for a, b in untouched):
                    yield Found(start, end, wording)


class TermNormalizer:
    """Replaces term variants by the canonical form.

    Rules: longest wording first over all terms; a canonical form is never changed inside; Latin variants at word
    boundaries only, abbreviations in capitals only, and only in a sentence that has Chinese in it when the canonical
    form is Chinese (an English sentence stays English); control tokens, tags, URLs and code stay untouched.
    Idempotent: `normalize(normalize(text)) == normalize(text)`.
    """

    def __init__(self, pack: DomainPack) -> None:
        """Take the terms, conditions and protected words of a pack."""
        wordings = [(term.canonical, term.canonical) for term in pack.terms]
        wordings += [(variant, term.canonical) for term in pack.terms for variant in term.variants]
        wordings += [(a.condition, a.condition) for a in pack.associations]
        wordings += [(word, word) for word in pack.protected_words]
        self._finder = WordFinder(wordings)

    def normalize(self, text: str) -> tuple[str, int]:
        """Return the text with canonical terms, and how many variants were replaced."""
        current, total = text, 0
        for _ in range(MAX_PASSES):
            # A replacement can complete a longer wording with its neighbours, hence until nothing changes.
            current, count = self._one_pass(current)
            if count == 0:
                return current, total
            total += count
        # Terms that feed each other never settle; leaving such a text alone keeps the function idempotent.
        return text, 0

    def _one_pass(self, text: str) -> tuple[str, int]:
        pieces, done, count = [], 0, 0
        for found in self._finder.find(text):
            if found.wording.becomes != found.wording.text and self._may_replace(text, found):
                pieces += [text[done : found.start], found.wording.becomes]
                done, count = found.end, count + 1
        return "".join([*pieces, text[done:]]), count

    @staticmethod
    def _may_replace(text: str, found: Found) -> bool:
        variant, canonical = found.wording.text, found.wording.becomes
        if text[found.start : found.end] == canonical:
            return False
        if text.startswith(NEXT_WORDS, found.end - 1):
            return False
        # 心梗 before 死 may be half of 心梗死: the replacement would stutter (心肌梗死死).
        if text[found.end : found.end + 1] == canonical[-1] != variant[-1]:
            return False
        if text[max(found.start - 1, 0) : found.start] == canonical[0] != variant[0]:
            return False
        if CJK.search(variant) or not CJK.search(canonical):
            return True
        return bool(CJK.search(_sentence_around(text, found.start, found.end)))


def _sentence_around(text: str, start: int, end: int) -> str:
    before = [match.end() for match in SENTENCE_END.finditer(text, 0, start)]
    after = SENTENCE_END.search(text, end)
    return text[before[-1] if before else 0 : after.start() if after else len(text)]
