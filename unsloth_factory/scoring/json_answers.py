"""JSON in answers: found where it stands, repaired only where there is one way to read it, compared field by field."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from unsloth_factory.scoring.answers import normalize_answer

FENCE = re.compile(
    r"(?P<marks>```+|~~~+)[ \t]*(?P<tag>[\w+-]*)[^\n]*\n(?P<body>.*?)(?:\n[ \t]*(?P=marks)|\Z)", re.DOTALL
)
BRACE = re.compile("[{｛]")
BRACES = re.compile("[{｛}｝]")
LOOKS_LIKE_OBJECT = re.compile(r"[{｛]\s*[\"'“‘＂]")
MAX_STARTS = 200
"""Braces of one answer at which an object is looked for."""
MAX_DEPTH = 60
QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "＂": "＂"}
FOLD = str.maketrans("｛｝［］：，", "{}[]:,")
ESCAPES = {**{char: char for char in "\"'\\/"}, "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORD = re.compile(r"[A-Za-z]+")
SPACE = re.compile(r"[ \t\r\n\u3000]*")
How = Literal["bare", "fenced", "in prose"]


@dataclass(frozen=True)
class FoundJson:
    """A JSON object of an answer."""

    value: dict[str, Any]
    how: How
    strict: bool
    """It is JSON as it stands; else quotes, commas or full-width punctuation were read as what they stand for."""


@dataclass(frozen=True)
class FieldScores:
    """An object's fields against the reference's."""

    right: dict[str, bool]
    """Each field of the reference -> whether the answer has it with the same value."""
    precision: float
    recall: float

    @property
    def accuracy(self) -> float:
        """Right fields as a share of the reference's."""
        return sum(self.right.values()) / len(self.right) if self.right else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall over values: superfluous fields cost something here."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def extract_json(text: str) -> FoundJson | None:
    """The JSON object that an answer gives; None where there is none or it cannot be read in one way alone.

    Looked for in this order: the whole answer, blocks fenced as json, other fenced blocks, the prose. Of several in one
    place the last counts: it is the conclusion. Read as what they stand for: single and curly quotes around names and
    values, commas before a closing bracket, full-width punctuation outside of strings, True, False and None. Not
    guessed: missing quotes, commas or brackets, cut-off text, a quote inside a string quoted alike, a name given twice.
    """
    whole = text.strip()
    if whole[:1] in "{｛" and (found := _parse(whole)):
        return FoundJson(found[0], "bare", found[1])
    fences = [match for match in FENCE.finditer(text)]
    for tagged in (True, False):
        for match in reversed(fences):
            if (match["tag"].lower() in ("json", "json5", "jsonc")) == tagged and (
                found := _parse(match["body"].strip())
            ):
                return FoundJson(found[0], "fenced", found[1])
    inside = list(_objects(text))
    return FoundJson(inside[-1][0], "in prose", inside[-1][1]) if inside else None


def _parse(text: str) -> tuple[dict[str, Any], bool] | None:
    """An object that is the whole text, and whether it is strict JSON."""
    found = _object_at(text, 0)
    return found[:2] if found and not text[found[2] :].strip() else None


def _objects(text: str) -> Iterator[tuple[dict[str, Any], bool]]:
    """Objects in the prose, outermost ones, in order."""
    position = 0
    for _ in range(MAX_STARTS):
        start = BRACE.search(text, position)
        if start is None:
            return
        found = _object_at(text, start.start())
        if found and found[0]:  # {} in prose is an example of nothing
            yield found[:2]
        position = found[2] if found else _past_unreadable(text, start.start())


def _past_unreadable(text: str, start: int) -> int:
    """Where to go on after a brace that opens nothing readable.

    What looks like an object is passed over whole (to the end of the text if it is never closed): an object inside of
    it is a part of a broken answer, not the answer.
    """
    if not LOOKS_LIKE_OBJECT.match(text, start):
        return start + 1
    depth = 0
    for match in BRACES.finditer(text, start):
        depth += 1 if match.group() in "{｛" else -1
        if depth == 0:
            return match.end()
    return len(text)


def _object_at(text: str, start: int) -> tuple[dict[str, Any], bool, int] | None:
    """(object, strict, end) of what starts there."""
    try:
        value, end = STRICT.raw_decode(text, start)
        return (value, True, end) if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        pass
    try:
        reader = _Reader(text, start)
        return reader.mapping(0), False, reader.at
    except _UnreadableError:
        return None


class _UnreadableError(Exception):
    """There is no reading, or more than one."""


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


STRICT = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)


class _Reader:
    """Reads an object whose punctuation is not JSON's."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def mapping(self, depth: int) -> dict[str, Any]:
        """An object from its opening brace on."""
        if depth > MAX_DEPTH:
            raise _UnreadableError
        self._take("{")
        pairs: list[tuple[str, Any]] = []
        while self._next() != "}":
            name = self._string()
            self._take(":")
            pairs.append((name, self._value(depth)))
            if self._next() != "}":
                self._take(",")
        self._take("}")
        try:
            return _unique(pairs)
        except ValueError as error:
            raise _UnreadableError from error

    def _list(self, depth: int) -> list[Any]:
        self._take("[")
        values = []
        while self._next() != "]":
            values.append(self._value(depth))
            if self._next() != "]":
                self._take(",")
        self._take("]")
        return values

    def _value(self, depth: int) -> Any:
        char = self._next()
        if char == "{":
            return self.mapping(depth + 1)
        if char == "[":
            if depth > MAX_DEPTH:
                raise _UnreadableError
            return self._list(depth + 1)
        if char in QUOTES:
            return self._string()
        if (number := NUMBER.match(self.text, self.at)) is not None:
            self.at = number.end()
            try:
                return json.loads(number.group())
            except ValueError:  # thousands of digits, as a model that is caught in a loop writes
                raise _UnreadableError from None
        word = WORD.match(self.text, self.at)
        if word is None or word.group() not in WORDS:
            raise _UnreadableError
        self.at = word.end()
        return WORDS[word.group()]

    def _string(self) -> str:
        """A quoted string, to the first closing quote: `'it's'` is then followed by no punctuation, and unreadable."""
        opening = self._next()
        if opening not in QUOTES:
            raise _UnreadableError
        closing = QUOTES[opening]
        self.at += 1
        out: list[str] = []
        while self.at < len(self.text):
            char = self.text[self.at]
            self.at += 1
            if char == closing:
                return "".join(out)
            if char == "\n" or (char == opening and opening != closing):
                raise _UnreadableError
            out.append(self._escaped() if char == "\\" else char)
        raise _UnreadableError

    def _escaped(self) -> str:
        char = self.text[self.at : self.at + 1]
        self.at += 1
        if char == "u":
            digits = self.text[self.at : self.at + 4]
            self.at += 4
            if re.fullmatch(r"[0-9a-fA-F]{4}", digits):
                return chr(int(digits, 16))
        if char not in ESCAPES:
            raise _UnreadableError
        return ESCAPES[char]

    def _next(self) -> str:
        """The next character that is no space, full-width punctuation folded; "" at the end."""
        match = SPACE.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return self.text[self.at : self.at + 1].translate(FOLD)

    def _take(self, char: str) -> None:
        if self._next() != char:
            raise _UnreadableError
        self.at += 1


def reference_object(reference: str) -> dict[str, Any] | None:
    """The object that a reference is: strict JSON, bare or in one fence, nothing around it; None for other texts."""
    found = extract_json(reference)
    around = FENCE.sub("", reference).strip() if found and found.how == "fenced" else ""
    return found.value if found and found.strict and found.how != "in prose" and not around and found.value else None


def compare_fields(answer: dict[str, Any] | None, reference: dict[str, Any]) -> FieldScores:
    """Field by field; nested fields by their path (a.b), lists whatever their order.

    Values are equal as `normalize_answer` has it: case, width and punctuation of no meaning do not count, 3 equals 3.0
    and "3". Precision and recall are over values: each element of a list is one.

    Args:
        answer: None where the answer has no object: every field is wrong then.
        reference: The object that was asked for.
    """
    expected, given = _values(reference), _values(answer or {})
    shared = sum((expected & given).values())
    fields = dict.fromkeys(path for path, _ in expected)
    right = {path: _of(expected, path) == _of(given, path) for path in fields}
    return FieldScores(
        right,
        shared / given.total() if given else float(not expected),
        shared / expected.total() if expected else 1.0,
    )


def _values(value: Any) -> Counter[tuple[str, str]]:
    return Counter(_leaves(value, ""))


def _of(values: Counter[tuple[str, str]], path: str) -> dict[str, int]:
    return {value: count for (name, value), count in values.items() if name == path}


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(inner, f"{path}.{name.strip()}" if path else name.strip())
    elif isinstance(value, list) and value:
        for inner in value:
            yield from _leaves(inner, f"{path}[]")
    elif path:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, (dict, list)):
        return json.dumps(value)  # the last two are empty here
    if isinstance(value, (int, float)):
        return repr(int(value)) if isinstance(value, int) or value.is_integer() else repr(value)
    # "无。" and "无" say the same; a string of punctuation alone says what it says
    return normalize_answer(value) or value.strip()
