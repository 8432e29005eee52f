r"""The one letter that a free answer chooses, in Chinese or English; None where it names none or several.

Evidence in order of strength, the first that is there decides: `\boxed{B}`; a sentence that names the answer
(答案是 B, 故选 B, the answer is B), the last one of several; a sentence that chooses (我选 B, I choose B); an option
that is called right (B 项正确, B is correct); a line of nothing but the letter; the only line that begins as an option
does (`B. 低盐饮食`); the only option that is spoken of (选项 B, option B, (B)); an option's very text. A letter in a
word or a name (维生素 D, hepatitis B) is none; who holds another letter possible in the same sentence chooses none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence

# Small letters count where nothing but punctuation follows: "the answer is a bit unclear" names none.
_L = r"(?:[A-Z](?![A-Za-z0-9'’])|[a-z](?=\s*(?:$|[)\].,;:!?。、，；：！？\n\"'”’])))"
# An English article at the beginning of what follows: "the answer is A good diet".
_ARTICLE = re.compile(r"\s(?!(?:because|since|is|as|and|or|for|with|due|which|based)\b)[a-z]+\b")
_QUOTES = r"[\s(\[{<\"'“‘「【】\]:]*"
_ADVERB = r"(?:(?:most\s+)?(?:probably|likely|clearly|definitely|simply|indeed)\s+)?"
_OPENING = rf"{_QUOTES}{_ADVERB}(?:选项|選項|option|choice|letter)?{_QUOTES}"
_NAMED = "|".join(
    (
        r"(?:答案|正确选项|正確選項|正确的选项|正确的(?=是|为)|结论|最终选择)"
        r"\s*(?:应该|应当|应|可能|就|只能|最终|显然|当然)?\s*(?:是|为|選|选择|选|:|=|->|→)*",
        r"(?:故|应|應|因此|所以|综上|本题|此题|正确答案)(?:本题|此题)?[,:]?\s*(?:应|應|该|当|正确)?\s*"
        r"(?:选择|选|選)(?:择|擇)?(?:的?是|为)?",
        r"而是|只能是|只剩下?|(?:所以|因此|应该)就?是|(?:正解|答|∴)\s*:?",
        r"\b(?:answer|correct|(?:correct|right|best) (?:choice|option|one))\b"
        r"(?:\s*(?:[:=]|->|→)|\s+-\s|[^.\n?:=]{0,40}?\b(?:is|be|was)\b)",
        r"\bit(?: is|'s| must be| should be)\b|\brather\b",
    )
)
_CHOSEN = (
    r"(?<![不勿别別非没未])(?<!不[能应该可会要想])(?:选择|選擇|选|選)(?:的是|了|择)?"
    r"|\b(?:choose|chose|pick|select|go with|opt for|therefore|hence|thus|so)\b,?"
)
_BOXED = re.compile(r"\\boxed\s*\{([^{}]{0,40})\}")
_SEPARATOR = (
    r"(?:\s*(?:、|/|&|\+|和|与|與|及|以及|或者?|还是|還是|\band\b|\bor\b|\bnor\b)\s*(?:选项|option)?\s*"
    r"|[ \t]+|\.(?=\S))"
)
_SEVERAL = re.compile(
    rf"[)\]\"'”]*(?:{_SEPARATOR}[(\[\"'“]*[A-Z](?![A-Za-z0-9])"
    r"|(?:\s*,\s*[(\[]?[A-Z][)\]]?)+(?=\s*(?:$|[.。;；!！\n])))"
)
# Another letter in the same sentence, held possible and nothing more: 'A, but maybe B' decides for neither.
_PERHAPS = re.compile(
    r"[^.。;；!！?\n]{0,20}?(?:\b(?:maybe|perhaps|possibly|(?:might|may|could)(?: also| well)* be)\b|可能|或许|也许)"
    r"\s*(?:就?是|为|选)?\s*(?:选项|option)?\s*[(\[\"'“]?([A-Z])(?=[)\]\"'”]*\s*(?:选项|项)?\s*(?:$|[.,;:!?。、；\n]))"
)
_WRONG = re.compile(
    r"[)\]\"'”]*\s*(?:项|項|选项|選項)?\s*(?:是|is|was)?\s*(?:错|錯|不|有误|not\b|n't|wrong|incorrect|吗|嗎|么\?)"
)
_DENIED = re.compile(r"(?:不是|排除|不选|\bnot\b)\s*$")
_IF = re.compile(
    r"(?:如果|若|假如|要是|倘若|\bif\b|\bdo not|\bdon't|\bcannot|\bnot to)[^.。,，;；\n]{0,12}$", re.IGNORECASE
)
_RIGHT = re.compile(
    r"(?<![A-Za-z0-9])([A-Z])(?:\s*\))?\s*(?:项|項|选项|選項)?\s*"
    r"(?:(?:才|最|更|也|都|均|的说法|说法|的描述)?(?:是|为)?(?:最)?"
    r"(?:正确|對的|对的|对(?=\s*[,.;。；]|\s*$)|合适|恰当|符合题意)(?!吗)|(?:是|为)(?:本题)?(?:的)?答案"
    r"|(?:is|would be)\s+(?:(?:most likely|clearly|therefore)\s+)?(?:the\s+)?"
    r"(?:(?:only\s+)?(?:correct|right|best|true)|answer)\b)"
)
_SPOKEN_OF = re.compile(
    r"(?:选项|選項|\boption\b|\bchoice\b)\s*[(\[\"'“]?([A-Z])(?![A-Za-z0-9])"
    r"|\(([A-Z])\)|(?<![A-Za-z0-9])([A-Z])\s*(?:选项|選項|项(?!目))",
    re.IGNORECASE,
)
_LINE = re.compile(r"^[\s(\[\"'“【]*([A-Z])[\s)\]\"'”】.。:、,!]*$", re.IGNORECASE | re.MULTILINE)
_OPTION_LINE = re.compile(
    r"(?:\A\(?(?=[a-z]\)))([a-z])"
    r"|^[\s(\[\"'“【]*([A-Z])\s*(?:[)\].:】](?!\s*[A-Z]\s*(?:[).、,:]|$))|[、,](?!\s*[A-Z](?![a-z])))\s*\S",
    re.MULTILINE,
)
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|rm|bf)\s*\{([^{}]*)\}")
_MARKS = re.compile(r"[*_`#$~]|\\[()\[\]]|</?(?:b|i|strong|em|answer)>", re.IGNORECASE)
_HEADING = re.compile(r"^\s*(?:正确)?答案\s*(?:是|为|:)*|^\s*(?:the )?answer(?: is|:)", re.IGNORECASE)


def chosen_letter(text: str, letters: Sequence[str] = ("A", "B", "C", "D"), options: Sequence[str] = ()) -> str | None:
    """The letter that an answer chooses.

    Args:
        text: The answer part alone, reasoning taken away.
        letters: Those that there are.
        options: The options' texts, in the letters' order; an answer that is one of them word by word chooses it.

    Returns:
        None for no letter, several letters, a letter that is no option, a refusal.
    """
    letters, plain = tuple(letters), _plain(text)
    boxed = _BOXED.findall(plain)
    if boxed:
        named = re.findall(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])", boxed[-1])
        first = re.match(r"\W*[A-Za-z](?:\W|$)", boxed[-1])
        return _known(map(str.upper, named), letters) if first else _by_text(boxed[-1], letters, options)
    for pattern, certain in ((_NAMED, True), (_CHOSEN, False)):
        statements = list(_statements(plain, pattern, certain))
        if statements:
            return statements[-1] if statements[-1] in letters else None
    right = {match[1] for match in _RIGHT.finditer(plain) if not _shared(plain, match.start())}
    if right:
        return _known(right, letters)
    alone = {match[1].upper() for match in _LINE.finditer(plain)}
    if alone:
        return _known(alone, letters)
    begun = {
        found.upper()
        for match in _OPTION_LINE.finditer(plain)
        for found in (match[match.lastindex or 0], _perhaps(plain, match.end(match.lastindex or 0)))
        if found
    }
    if begun:
        return _known(begun, letters)
    spoken = {
        "".join(filter(None, match.groups())).upper()
        for match in _SPOKEN_OF.finditer(plain)
        if not _WRONG.match(plain, match.end())
        and not _DENIED.search(plain[max(0, match.start() - 20) : match.start()])
    }
    return _known(spoken, letters) if spoken else _by_text(plain, letters, options)


def _plain(text: str) -> str:
    """Full-width letters and marks made plain; emphasis and wrappers taken away."""
    plain = unicodedata.normalize("NFKC", text)
    return _MARKS.sub("", _WRAPPED.sub(r"\1", plain)).strip()


def _known(found: Iterable[str], letters: Sequence[str]) -> str | None:
    """The only one, if it is an option."""
    unique = set(found)
    letter = next(iter(unique)) if len(unique) == 1 else None
    return letter if letter in letters else None


def _statements(plain: str, pattern: str, certain: bool) -> Iterable[str]:
    """The letter of each statement, "" where it names several."""
    for match in re.finditer(rf"(?i:{pattern})(?i:{_OPENING})({_L})", plain):
        letter, end = match[1], match.end()
        if letter == "A" and _ARTICLE.match(plain, end):
            continue
        if _WRONG.match(plain, end) or (not certain and _IF.search(plain[max(0, match.start() - 20) : match.start()])):
            continue
        undecided = _perhaps(plain, end) not in (None, letter.upper())
        yield "" if undecided or _SEVERAL.match(plain, end) else letter.upper()


def _perhaps(plain: str, place: int) -> str | None:
    """The letter that the sentence goes on to hold possible too."""
    match = _PERHAPS.match(plain, place)
    return match[1] if match else None


def _shared(plain: str, place: int) -> bool:
    """Whether the letter at this place closes a list: 'A 和 B 正确' calls no single one right."""
    return re.search(rf"[A-Z]{_SEPARATOR}[(\[]*$", plain[max(0, place - 20) : place]) is not None


def _by_text(plain: str, letters: Sequence[str], options: Sequence[str]) -> str | None:
    wanted = _words(_HEADING.sub("", plain))
    equal = [letter for letter, option in zip(letters, options, strict=False) if _words(_plain(option)) == wanted]
    return equal[0] if len(equal) == 1 and wanted else None


def _words(text: str) -> str:
    return text.strip(" \t\n.。!,，\"'“”").casefold()
