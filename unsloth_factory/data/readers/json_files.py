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
_LISTED_LINES = 50


class _Decoder:
    """json with what it lets through made visible: NaN, 1e400, duplicate keys, lone surrogates, NUL."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._decoder = json.JSONDecoder(
            parse_constant=lambda name: self.problems.append(f"{name} is not a JSON number"),
            parse_float=self._float,
            parse_int=self._int,
            object_pairs_hook=self._object,
        )

    def decode(self, text: str, start: int = 0) -> tuple[Any, int, str | None]:
        """(value, end position, problem or None) of the JSON value at `start`."""
        self.problems.clear()
        value, end = self._decoder.raw_decode(text, start)
        if text.find("\\u", start, end) >= 0:
            escaped = text[start:end].lower()
            if "\\u0000" in escaped:
                self.problems.append("a NUL character in the text")
            if "\\ud" in escaped and _has_lone_surrogate(value):
                self.problems.append("half of a surrogate pair in the text")
        return value, end, self.problems[0] if self.problems else None

    def _float(self, digits: str) -> float:
        number = float(digits)
        if number in (float("inf"), float("-inf")):
            self.problems.append(f"the number {digits} is too large")
        return number

    def _int(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:  # more than 4,300 digits
            self.problems.append(f"the number {digits[:10]}... is too large")
            return 0

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            self.problems.append(f"the key {twice!r} appears twice")
        return values


def read_json(text: str, path: Path, *, skip_broken: bool = False) -> tuple[str, Iterator[Row]]:
    """("json" or "jsonl", rows) of a file's text; decided by the text, because JSON lines are often named .json.

    Args:
        text: The whole file.
        path: For messages.
        skip_broken: Broken JSON is a problem of its row; in an array or among objects, whose next row cannot be found,
            it ends the rows.

    Raises:
        UserError: Broken JSON, with line and column; a value that is not an object is a problem of its row only.
    """
    start = _skip_blanks(text, 0)
    line_end = "\n" if "\n" in text else "\r"  # the line ends of Unix and Windows, or of the old Mac
    end = text.find(line_end, start)
    one_line = end < 0 or _skip_blanks(text, end) == len(text)
    first = text[start:end] if not one_line else ""
    if text[start] == "[" and not _is_json(first, list):
        return "json", _until_broken(_array(text, start, path), skip_broken)
    if _is_json(first, dict) or text[start] != "{" or path.suffix.lower() != ".json":
        return "jsonl", _lines(text, path, line_end, skip_broken)
    return "json", _until_broken(_objects(text, start, path), skip_broken)


class _BrokenJson(UserError):
    """Broken JSON in an array or among objects; `row` counts from 1."""

    def __init__(self, message: str, row: int, what: str) -> None:
        super().__init__(message)
        self.row, self.what = row, what


def _until_broken(rows: Iterator[Row], skip_broken: bool) -> Iterator[Row]:
    try:
        yield from rows
    except _BrokenJson as error:
        if not skip_broken:
            raise
        yield Row(error.row, None, f"broken JSON ({error.what}); the rest of the file is lost")


def _is_json(line: str, kind: type) -> bool:
    """Whether a whole line is one value of that kind."""
    try:
        return bool(line) and isinstance(json.loads(line), kind)
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


def _lines(text: str, path: Path, line_end: str, skip_broken: bool) -> Iterator[Row]:
    """Split at line feeds alone: str.splitlines would also cut at U+2028 inside a string."""
    decoder = _Decoder()
    broken: dict[int, str] = {}
    for number, line in enumerate(text.split(line_end), 1):
        line = line.rstrip(" \t\r")
        start = _skip_blanks(line, 0)
        if start == len(line):
            continue
        try:
            value, end, problem = decoder.decode(line, start)
            if end < len(line):
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            broken[number] = f"line {number}, column {error.pos + 1}: {error.msg}"
            if skip_broken:
                yield Row(number, None, f"broken JSON ({error.msg})")
        except RecursionError:
            yield Row(number, None, "nested too deeply")
        else:
            yield _row(number, value, problem)
    if broken and not skip_broken:
        raise UserError(
            f"{path}: broken JSON in {'; '.join(list(broken.values())[:_SHOWN_LINES])}{_further(broken)}. "
            "Mend or delete these lines, or leave them out with --bad_rows skip; a last line that was cut off means "
            "that the file is incomplete."
        )


def _further(broken: dict[int, str]) -> str:
    """The numbers of the broken lines that are not described."""
    numbers = list(broken)[_SHOWN_LINES:]
    if not numbers:
        return ""
    listed = ", ".join(map(str, numbers[:_LISTED_LINES])) + (", ..." if len(numbers) > _LISTED_LINES else "")
    return f" (and {len(numbers)} more lines: {listed})"


def _array(text: str, start: int, path: Path) -> Iterator[Row]:
    decoder = _Decoder()
    position = _skip_blanks(text, start + 1)
    number = 0
    while text[position : position + 1] != "]":
        number += 1
        if number > 1:
            if text[position : position + 1] != ",":
                raise _broken(text, position, "',' or ']' was expected", path, number)
            position = _skip_blanks(text, position + 1)
        value, position, problem = _decode_at(decoder.decode, text, position, path, number)
        yield _row(number, value, problem)
        position = _skip_blanks(text, position)
    rest = _skip_blanks(text, position + 1)
    if rest < len(text):
        raise _broken(text, rest, "text after the end of the array", path, number + 1)


def _objects(text: str, start: int, path: Path) -> Iterator[Row]:
    """One object, several written one after the other, or one that wraps the list of rows."""
    decoder = _Decoder()
    first, start, problem = _decode_at(decoder.decode, text, start, path, 1)
    start = _skip_blanks(text, start)
    if start == len(text) and isinstance(first, dict):
        wrapped = [first[key] for key in _LIST_KEYS if isinstance(first.get(key), list)]
        if len(wrapped) == 1:
            yield from (_row(number, value, problem) for number, value in enumerate(wrapped[0], 1))
            return
    yield _row(1, first, problem)
    number = 1
    while start < len(text):
        number += 1
        value, start, problem = _decode_at(decoder.decode, text, start, path, number)
        yield _row(number, value, problem)
        start = _skip_blanks(text, start)


def _decode_at(
    decode: Callable[[str, int], tuple[Any, int, str | None]], text: str, position: int, path: Path, number: int
) -> tuple[Any, int, str | None]:
    try:
        return decode(text, position)
    except json.JSONDecodeError as error:
        raise _broken(text, error.pos, error.msg, path, number) from None
    except RecursionError:
        raise _broken(text, position, "nested too deeply", path, number) from None


def _broken(text: str, position: int, what: str, path: Path, number: int) -> _BrokenJson:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    end = " The file ends there: it is incomplete." if position >= len(text.rstrip()) else ""
    message = (
        f"{path} line {line}, column {column}: broken JSON in row {number}: {what}.{end} "
        "Mend the file at that place; --bad_rows skip takes the rows before it."
    )
    return _BrokenJson(message, number, what)


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position
