"""Is something said as advice, or is it forbidden, asked or refuted? Rules for Chinese and English; no model.

The scope idea is NegEx's (Chapman et al. 2001, J. Biomed. Inform. 34:301-310): a negation word acts on what follows it
inside the same clause. Added here: double negation (an even number of nested negations is none), enumeration
(不要催吐、导泻), circumstances that only look like a negation (未经医生同意), new instructions that end the scope
(不要喝水应立即催吐), verdicts that follow (催吐是错误的), questions, and reported advice that the text refutes.
"""

from __future__ import annotations

import re

from unsloth_factory.scoring import negation_words as words

NEGATIVE = re.compile(f"(?P<pseudo>{words.PSEUDO})|(?P<strong>{words.STRONG})|(?P<weak>{words.WEAK})", re.IGNORECASE)
LIGHT = words.compile_words(words.LIGHT)
CIRCUMSTANCE = words.compile_words(words.CIRCUMSTANCE)
BREAK = words.compile_words(words.BREAK)
STATES = words.compile_words(words.STATES)
CONSEQUENCE = words.compile_words(words.CONSEQUENCE)
GOVERNED = words.compile_words(words.GOVERNED)
COORDINATOR = words.compile_words(words.COORDINATOR)
BOUNDARY = words.compile_words(words.CONTRAST)
CONTINUES = words.compile_words(words.CONTINUES)
AFTERWARDS = words.compile_words(words.AFTERWARDS)
LABEL = words.compile_words(words.LABEL)
REPORT = words.compile_words(words.REPORT)
POINTS_BACK = words.compile_words(words.POINTS_BACK)
WRONG = words.compile_words(words.WRONG)
REBUTTED = words.compile_words(words.REBUTTED)
ASKED = words.compile_words(words.ASKED)
TAG_QUESTION = words.compile_words(words.TAG_QUESTION)
RHETORICAL = words.compile_words(words.RHETORICAL)
SENTENCE = re.compile(r"(?:[^。！？!?；;\n.]|\.(?!\s|$)|(?<=\d)\.)+[。！？!?；;\n.]?[”\"』」’）)]*|[。！？!?；;\n.]")
LIST_ITEM = re.compile(r"\s*(?:[-*•·]|[(（]?\d{1,2}[.、)）]|[①-⑳]|[(（]?[一二三四五六七八九十][、)）])")
LISTED = re.compile(r",\s*n?or\b", re.IGNORECASE)
MAX_NESTED_GAP = 4


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, in reading order; a line break, `;` and `；` end one too."""
    return [match.span() for match in SENTENCE.finditer(text) if match.group().strip()]


def sentence_at(text: str, position: int) -> tuple[int, int]:
    """Start and end of the sentence that holds `text[position]`."""
    for start, end in sentence_spans(text):
        if start <= position < end:
            return start, end
    return 0, len(text)


def is_negated(text: str, start: int, end: int) -> bool:
    """Whether the words `text[start:end]` are negated within their clause."""
    first, last = sentence_at(text, start)
    prefix = text[_scope_start(text, first, start, last) : start]
    if _is_must(prefix, text[end:last]):
        return False
    return _negations(prefix) % 2 == 1 or _under_label(text, first, start)


def is_condemned(text: str, start: int, end: int) -> bool:
    """Whether a verdict follows the words in their clause: 催吐是错误的, 催吐会加重灼伤, "… is dangerous"."""
    first, last = sentence_at(text, start)
    rest = _clause_rest(text, end, last)
    return bool(AFTERWARDS.match(rest)) and not _is_must(text[first:start], rest)


def is_asked(text: str, start: int, end: int) -> bool:
    """Whether the words `text[start:end]` stand in a question; 为什么不…？ and "…, right?" are advice all the same."""
    first, last = sentence_at(text, start)
    before = text[first:start]
    if RHETORICAL.search(before):
        return False
    if ASKED.search(text[_scope_start(text, first, start, last) : start]):
        return True
    sentence = text[first:last].strip().rstrip('”"』」’）)')
    if not sentence.endswith(("？", "?")):
        return False
    tag = TAG_QUESTION.search(sentence)
    return tag is None or sentence.rfind(text[start:end]) > tag.start()


def is_refuted(text: str, start: int, end: int) -> bool:
    """Whether the text takes the words back: reported advice that it contradicts, or 这是错误的 right after."""
    first, last = sentence_at(text, start)
    rest = text[end:last]
    following = next((text[a:b] for a, b in sentence_spans(text) if a >= last), "")
    for continuation in (_after_boundary(rest), following):
        if POINTS_BACK.match(continuation) and WRONG.search(continuation):
            return True
    reported = REPORT.search(text, first, start)
    return bool(reported and (WRONG.search(rest) or REBUTTED.search(rest) or REBUTTED.match(following)))


def is_asserted(text: str, start: int, end: int) -> bool:
    """Whether the words `text[start:end]` are said as advice or fact: not negated, condemned, asked or refuted."""
    return not any(check(text, start, end) for check in (is_negated, is_condemned, is_asked, is_refuted))


def _is_must(before: str, after: str) -> bool:
    """非……不可, two negations around the words that make them a duty."""
    return bool(re.search(r"非(?!常)[^，,]{0,6}$", before) and re.match(r"[^，,]{0,4}?不(?:可|行)", after))


def _scope_start(text: str, first: int, start: int, last: int) -> int:
    """Start of the clause of `start`; earlier where it continues an enumeration (……，或……; ", a, or b")."""
    starts = [first, *(first + match.end() for match in BOUNDARY.finditer(text[first:start]))]
    scope = starts.pop()
    listed = LISTED.search(text, start, last) is not None or LISTED.match(text, max(scope - 1, 0)) is not None
    while starts and (CONTINUES.match(text, scope) or listed) and text[scope - 1] in "，,":
        scope = starts.pop()
    return scope


def _clause_rest(text: str, end: int, last: int) -> str:
    boundary = BOUNDARY.search(text, end, last)
    return text[end : boundary.start() if boundary else last]


def _after_boundary(rest: str) -> str:
    boundary = re.search(r"[，,]", rest)
    return rest[boundary.end() :] if boundary else ""


def _negations(prefix: str) -> int:
    """How many nested negations in `prefix` act on what follows it; coordinated ones (不能、不应) count once."""
    prefix = CIRCUMSTANCE.sub(lambda match: "　" * len(match.group()), prefix)
    count, target = 0, len(prefix)
    for match in reversed([m for m in NEGATIVE.finditer(prefix) if not m["pseudo"]]):
        gap = prefix[match.end() : target]
        if match["weak"] and not LIGHT.fullmatch(gap.strip()):
            continue
        if count == 0:
            if not _reaches(match.group(), gap):
                continue
        elif not _nested(gap):
            break
        count, target = count + 1, match.start()
        if match.group().lower() == "nor":
            break  # neither … nor: one negation
    return count


def _reaches(negation: str, gap: str) -> bool:
    if GOVERNED.match(gap):
        return True
    if STATES.fullmatch(negation) and CONSEQUENCE.search(gap):
        return False
    return not BREAK.search(gap)


def _nested(gap: str) -> bool:
    bare = gap.strip("　 ")
    short = len(bare.split()) <= 2 if bare.isascii() else len(bare) <= MAX_NESTED_GAP
    return short and not COORDINATOR.search(bare)


def _under_label(text: str, first: int, start: int) -> bool:
    """Whether a negative heading governs the words: 误区：…, or 以下禁止： above the list that they stand in."""
    own = [match for match in LABEL.finditer(text[first:start])]
    if own:
        return "。" not in text[first + own[-1].end() : start]
    line_start = text.rfind("\n", 0, start) + 1
    while line_start > 0 and LIST_ITEM.match(text, line_start):
        previous = text.rfind("\n", 0, line_start - 1) + 1
        heading = text[previous : line_start - 1].rstrip()
        if heading.endswith(("：", ":")):
            return bool(LABEL.search(heading)) and _negations(heading[:-1]) % 2 == 1 or _is_bad_label(heading)
        line_start = previous
    return False


def _is_bad_label(heading: str) -> bool:
    return bool(re.search(r"(?:误区|错误|谣言|禁忌)[^，,。]{0,14}[：:]$", heading))
