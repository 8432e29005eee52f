"""The form of an answer, whatever it says: phrases again and again, thinking that went wrong, the wrong language."""

from __future__ import annotations

import re
from collections import Counter
from typing import Literal

from unsloth_factory.scoring.text import text_tokens

NGRAM = 10
REPEATS = 4
THINK_TAG = re.compile(r"</?think(?:ing)?>", re.IGNORECASE)
SCRIPTS = {
    "Chinese": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Japanese": "\u3040-\u30ff",
    "Korean": "\uac00-\ud7a3\u1100-\u11ff",
    "Cyrillic": "\u0400-\u04ff",
    "Arabic": "\u0600-\u06ff",
    "Latin": "A-Za-z\u00c0-\u024f",
}
# One unit a character where words are not spaced, else one a word.
UNITS = {
    name: re.compile(f"[{chars}]" if name in ("Chinese", "Japanese") else f"[{chars}]+")
    for name, chars in SCRIPTS.items()
}
SYMBOLS = re.compile(
    r"[A-Z]{1,5}\d*\b|\b\w*\d\w*\b|`[^`]*`|https?://\S+|<[^>]*>|\b(?:mg|ml|kg|g|mmol|L|mmHg|cm|mm)\b", re.ASCII
)
FEWEST_UNITS = 4
SENTENCE = re.compile(r"[^。！？!?\n.]+[。！？!?\n.]*")
FOREIGN_UNITS = 6
Thinking = Literal["fine", "missing", "stray tags", "no answer after it"]


def repeated_ngram(text: str, *, n: int = NGRAM, times: int = REPEATS) -> str | None:
    """A sequence of n tokens that stands in the text `times` times or more, wherever; None without one.

    Tokens as in `text_tokens` (Chinese characters, words). Overlapping places count once, so that a row of one
    character is no repetition of itself shifted.
    """
    tokens = text_tokens(text)
    counts: Counter[tuple[str, ...]] = Counter()
    last: dict[tuple[str, ...], int] = {}
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        if start - last.get(gram, -n) < n:
            continue
        last[gram] = start
        counts[gram] += 1
        if counts[gram] >= times:
            wide = any(len(token) > 1 for token in gram)
            return (" " if wide else "").join(gram)
    return None


def thinking_state(answer: str, reasoning: str | None, thinking: bool | None) -> Thinking:
    """What became of the thinking.

    Args:
        answer: The part behind the reasoning.
        reasoning: The reasoning, None without any.
        thinking: Whether the prompt asked for it; None: the template knows no such switch, or it was left alone.
    """
    if THINK_TAG.search(answer) or (reasoning and THINK_TAG.search(reasoning)):
        return "stray tags"
    if reasoning and not answer.strip():
        return "no answer after it"
    return "missing" if thinking and not (reasoning or "").strip() else "fine"


def language_of(text: str) -> str | None:
    """The script that most of a text is written in, "Chinese" or "Latin" for example; None for fewer than 4 words.

    Chinese and Japanese characters count one each, words of other scripts one each; abbreviations (CT, HbA1c), units,
    code and links do not count. Kana make Chinese characters Japanese.
    """
    rest = SYMBOLS.sub(" ", text)
    counts = {name: len(pattern.findall(rest)) for name, pattern in UNITS.items()}
    if counts["Japanese"] * 10 >= counts["Chinese"] and counts["Japanese"]:
        counts["Japanese"] += counts.pop("Chinese")
    name, most = max(counts.items(), key=lambda item: item[1])
    return name if most >= FEWEST_UNITS else None


def language_switch(answer: str, reference: str) -> str | None:
    """How an answer leaves the language of its reference, in words; None where it does not.

    Either as a whole ("Latin instead of Chinese"), or in a sentence of 6 words or more ("Latin within Chinese"), unless
    the reference does so too.
    """
    expected = language_of(reference)
    given = language_of(answer)
    if expected is None or given is None:
        return None
    if given != expected:
        return f"{given} instead of {expected}"
    known = {language_of(sentence) for sentence in SENTENCE.findall(reference)}
    for sentence in SENTENCE.findall(answer):
        other = language_of(sentence)
        if other is not None and other not in known | {expected}:
            rest = SYMBOLS.sub(" ", sentence)
            if len(UNITS[other].findall(rest)) >= FOREIGN_UNITS:
                return f"{other} within {expected}"
    return None
