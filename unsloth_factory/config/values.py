"""Text and YAML values -> the type that a field declares."""

from __future__ import annotations

import contextlib
import math
import re
import types
from typing import Any, Literal, NewType, Union, get_args, get_origin

Seconds = NewType("Seconds", float)
"""Annotation of a field that holds a time span: a number of seconds, given as 90, 90s, 5m, 2.5h or 1h30m."""

Bytes = NewType("Bytes", int)
"""Annotation of a field that holds an amount of memory: 14.5GiB, 16GB, 8000MiB, or a number of bytes."""

Names = NewType("Names", str)
"""Annotation of a field that takes several words on the command line; it holds them joined by commas."""

LARGEST_INT = 2**63 - 1  # what torch, numpy and the file formats hold
TRUE_WORDS = {"true", "yes", "on", "1"}
FALSE_WORDS = {"false", "no", "off", "0"}
UNIT_SECONDS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
UNIT_BYTES = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
AMOUNT = re.compile(r"(\d+(?:\.\d+)?)([kmg]i?b)?")
TIME_SPAN = re.compile(r"(?:([\d.]+)d)?(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?")


class BadValue(ValueError):
    """The value does not fit the declared type; the message says what would."""


def without_none(annotation: Any) -> tuple[Any, bool]:
    """`int | None` -> (int, True); any other annotation -> (itself, False)."""
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [part for part in get_args(annotation) if part is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return annotation, False


def convert(value: Any, annotation: Any) -> Any:
    """Bring a command-line text or a YAML value to a field's type.

    YAML 1.1 reads `1e-4` as text and `no` as false; numbers are therefore taken from text as well, and a truth value
    never passes for a number or a name. A list of plain values is a text with commas.

    Raises:
        BadValue: It does not fit.
    """
    target, optional = without_none(annotation)
    if value is None or (optional and isinstance(value, str) and value.lower() in ("none", "null")):
        if optional:
            return None
        raise BadValue("needs a value")
    if get_origin(target) is Literal:
        return _choice(value, get_args(target))
    if target is bool:
        return _truth(value)
    if target is int:
        return _whole_number(value)
    if target is float:
        return _number(value)
    if target is Seconds:
        return _seconds(value)
    if target is Bytes:
        return _bytes(value)
    if get_origin(target) is dict:
        return _mapping(value)
    if isinstance(value, list) and all(_is_plain(item) for item in value):
        return ",".join(map(str, value))
    if not _is_plain(value):
        raise BadValue(f"expects a text, got {shortened(repr(value))} (put it in quotes if it is one)")
    return str(value)


def shortened(text: str, most: int = 100) -> str:
    """The text, or its beginning and its length, for messages."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if not isinstance(value, bool) and str(value).lower() == str(choice).lower():
            return choice
    raise BadValue(f"must be one of {', '.join(map(str, choices))}")


def _truth(value: Any) -> bool:
    word = str(value).lower()
    if word in TRUE_WORDS or word in FALSE_WORDS:
        return word in TRUE_WORDS
    raise BadValue("must be true or false")


def _whole_number(value: Any) -> int:
    whole = None
    if isinstance(value, str | int) and not isinstance(value, bool):
        # Not through a float, which would change integers above 2^53.
        with contextlib.suppress(ValueError):
            whole = int(value)
    if whole is None:
        number = _number(value)
        whole = int(number)
        if whole != number:
            raise BadValue("must be a whole number")
    if abs(whole) > LARGEST_INT:
        raise BadValue(f"must lie within {LARGEST_INT}")
    return whole


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise BadValue("must be a number, not true/false")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadValue("must be a number") from None
    if not math.isfinite(number):
        raise BadValue("must be a finite number")
    return number


def _seconds(value: Any) -> float:
    parts = TIME_SPAN.fullmatch(str(value).replace(" ", "").lower())
    if isinstance(value, bool) or not parts or not any(parts.groups()):
        raise BadValue("must be a time span such as 90 (seconds), 90s, 5m, 2.5h or 1h30m")
    return sum(_number(part) * unit for part, unit in zip(parts.groups(), UNIT_SECONDS.values(), strict=True) if part)


def _bytes(value: Any) -> int:
    parts = AMOUNT.fullmatch(str(value).replace(" ", "").lower())
    if isinstance(value, bool) or not parts:
        raise BadValue("must be an amount of memory such as 14.5GiB, 16GB, 8000MiB or a number of bytes")
    return int(float(parts[1]) * UNIT_BYTES[parts[2] or ""])


def _mapping(value: Any) -> dict[str, str]:
    if isinstance(value, dict):
        if not all(_is_plain(part) for pair in value.items() for part in pair):
            raise BadValue("must hold names and texts alone")
        return {str(key): str(item) for key, item in value.items()}
    pairs = [part.split("=", 1) for part in str(value).split(",") if part.strip()]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise BadValue("must look like name=value,name=value")
    return {key.strip(): item.strip() for key, item in pairs}
