"""JSON arrays and JSON lines, whatever the file is called."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers.table import Row

_LIST_KEYS = ("data", "rows", "train", "examples", "instances")
_SHOWN_LINES = 3


class _Decoder:
    """json with what it lets through made visible: NaN, 1e400, duplicate keys, lone surrogates, NUL."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=lambda name: self.problems.append(f"{name} is not a JSON number"),
            parse_float=self._float,
            object_pairs_hook=self._object,
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str | None]:
        """(value, end position, problem or None) of the JSON value at `start`."""
        self.problems.clear()
        value, end = self._decoder.raw_decode(text, start)
        piece = text[start:end].lower() if "\\u" in text[start:end].lower() else ""
        if "\\u0000" in piece:
            self.problems.append("a NUL character in the text")
        if "\\ud" in piece and _has_lone_surrogate(value):
            self.problems.append("half of a surrogate pair in the text")
        return value, end, self.problems[0] if self.problems else None

    def _float(self, digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            self.problems.append(f"the number {digits} is too large")
        return number

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            self.problems.append(f"the key {twice!r} appears twice")
        return values


def read_json(text: str, path: Path) -> tuple[str, Iterator[Row]]:
    """("json" or "jsonl", rows) of a file's text; decided by the text, because JSON lines are often named .json.

    Raises:
        UserError: Broken JSON, with line and column; a value that is not an object is a problem of its row only.
    """
    start = _skip_blanks(text, 0)
    if text[start] == "[":
        return "json", _array(text, start, path)
    first_line, _, rest = text[start:].partition("\n")
    lines = _is_object(first_line) and rest.strip()
    if lines or text[start] != "{" or path.suffix.lower() != ".json":
        return "jsonl", _lines(text, path)
    return "json", _objects(text, start, path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _row(number: int, value: Any, problem: str | None) -> Row:
    if problem is None and not isinstance(value, dict):
        problem = f"a JSON object was expected, found {type(value).__name__}"
    return Row(number, None if problem else value, problem)


def _lines(text: str, path: Path) -> Iterator[Row]:
    """Split at line feeds alone: str.splitlines would also cut at U+2028 inside a string."""
    decoder = _Decoder()
    broken: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip(" \t\r")
        start = _skip_blanks(line, 0)
        if start == len(line):
            continue
        try:
            value, end, problem = decoder.decode(line, start)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            broken.append(f"line {number}, column {error.pos + 1}: {error.msg}")
        except RecursionError:
            yield Row(number, None, "nested too deeply")
        else:
            yield _row(number, value, problem)
    if broken:
        more = f" (and {len(broken) - _SHOWN_LINES} more lines)" if len(broken) > _SHOWN_LINES else ""
        raise UserError(
            f"{path}: broken JSON in {'; '.join(broken[:_SHOWN_LINES])}{more}. "
            "Mend or delete these lines; a last line that was cut off means the file is incomplete."
        )


def _array(text: str, start: int, path: Path) -> Iterator[Row]:
    decoder = _Decoder()
    position = _skip_blanks(text, start + 1)
    number = 0
    while text[position : position + 1] != "]":
        if number:
            if text[position : position + 1] != ",":
                raise _broken(text, position, "',' or ']' was expected", path)
            position = _skip_blanks(text, position + 1)
        number += 1
        value, position, problem = _decode_at(decoder.decode, text, position, path)
        yield _row(number, value, problem)
        position = _skip_blanks(text, position)
    rest = _skip_blanks(text, position + 1)
    if rest < len(text):
        raise _broken(text, rest, "text after the end of the array", path)


def _objects(text: str, start: int, path: Path) -> Iterator[Row]:
    """One object, several written one after the other, or one that wraps the list of rows."""
    decoder = _Decoder()
    values: list[tuple[Any, str | None]] = []
    while start < len(text):
        value, end, problem = _decode_at(decoder.decode, text, start, path)
        values.append((value, problem))
        start = _skip_blanks(text, end)
    if len(values) == 1 and isinstance(values[0][0], dict):
        only = values[0][0]
        wrapped = [only[key] for key in _LIST_KEYS if isinstance(only.get(key), list)]
        if len(wrapped) == 1:
            values = [(value, values[0][1]) for value in wrapped[0]]
    return (_row(number, value, problem) for number, (value, problem) in enumerate(values, 1))


def _decode_at(
    decode: Callable[[str, int], tuple[Any, int, str | None]], text: str, position: int, path: Path
) -> tuple[Any, int, str | None]:
    try:
        return decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, error.msg, path) from None
    except RecursionError:
        raise _broken(text, position, "nested too deeply", path) from None


def _broken(text: str, position: int, what: str, path: Path) -> UserError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    end = " The file ends there: it is incomplete." if position >= len(text.rstrip()) else ""
    return UserError(f"{path} line {line}, column {column}: broken JSON: {what}.{end} Mend the file at that place.")


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
