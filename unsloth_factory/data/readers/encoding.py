"""Bytes to text: marks first, then strict tries of UTF-8, GBK and GB18030; a mere guess is offered, never taken."""

from __future__ import annotations

import codecs
from collections import Counter
from pathlib import Path

from unsloth_factory.config.errors import UsageError, UserError

# UTF-32 first: its little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# GB2312 orders its 3,755 most used characters first, in these lead bytes; A1-A3 hold punctuation and full-width forms.
_COMMON_LEADS = frozenset(range(0xB0, 0xD8)) | {0xA1, 0xA2, 0xA3}
_COMMON_SHARE = 0.6
# In running Chinese every fourth character is one of these or a wide punctuation mark. EUC-KR's Hangul falls on the
# same lead bytes, but on other characters.
_FREQUENT = frozenset(
    "的一是不了在有人这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可里后小么心多天而能"
    "好都然没于起还发成事只作当想看无开用请问病什，。？！：；、（）《》“”"
)
_FREQUENT_SHARE = 0.03
_ENOUGH = 40  # characters from which on the share says something
_SAMPLE = 1 << 20


def decode(raw: bytes, path: Path, encoding: str = "auto") -> tuple[str, str]:
    """(text without byte-order mark, name of the encoding) of a file's bytes.

    Args:
        raw: The whole file.
        path: For messages.
        encoding: "auto", or a codec name, which then must fit.

    Raises:
        UserError: The bytes do not fit the given encoding, or none could be found; names the first bad byte's line.
    """
    if encoding != "auto":
        return _decode_as(raw, path, encoding)
    for mark, name in _MARKS:
        if raw.startswith(mark):
            return _decode_as(raw, path, name)
    head = raw[:4096]
    if head.count(0) * 10 > len(head):
        raise UserError(
            f"{path} holds many zero bytes: a binary file, or UTF-16 without its mark. "
            "Give --encoding utf-16-le (or utf-16-be), or save the file as UTF-8."
        )
    for name in ("utf-8", "gbk", "gb18030"):
        try:
            text = raw.decode(name)
        except UnicodeDecodeError:
            continue
        if name == "utf-8" or _reads_like_chinese(text):
            return text.removeprefix("\ufeff"), name
    raise _damaged(raw, path) or _foreign(raw, path)


def _decode_as(raw: bytes, path: Path, encoding: str) -> tuple[str, str]:
    try:
        return raw.decode(encoding).removeprefix("\ufeff"), encoding
    except LookupError:
        raise UsageError(f"--encoding {encoding}: no such encoding. Use auto, utf-8, gbk, gb18030 or utf-16.") from None
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: byte 0x{raw[error.start]:02x} is not {encoding}. "
            "The file is damaged there or in another encoding; try --encoding auto."
        ) from None
    except UnicodeError as error:
        raise UserError(f"--encoding {encoding}: {path} cannot be read so ({error}). Try --encoding auto.") from None


def _reads_like_chinese(text: str) -> bool:
    """Whether GBK was right: Western, Big5 and Korean bytes often decode as GBK too, but into other characters."""
    wide = {c: n for c, n in Counter(text[:_SAMPLE]).items() if c > "\x7f"}
    codes = {c: c.encode("gb18030") for c in wide}
    common = sum(n for c, n in wide.items() if codes[c][0] in _COMMON_LEADS and codes[c][1] >= 0xA1)
    total = sum(wide.values())
    frequent = sum(n for c, n in wide.items() if c in _FREQUENT)
    return common >= _COMMON_SHARE * total and (total < _ENOUGH or frequent >= _FREQUENT_SHARE * total)


def _damaged(raw: bytes, path: Path) -> UserError | None:
    """Where a file is UTF-8 or GB18030 but for few bytes: its encoding is known, and some of it is lost."""
    for name in ("utf-8", "gb18030"):
        text = raw.decode(name, "replace")
        bad = text.count("\ufffd")
        wide = len(text) - len(text.encode("ascii", "ignore"))
        if bad * 20 > wide or not (name == "utf-8" or _reads_like_chinese(text)):
            continue
        lines = [number for number, line in enumerate(text.split("\n"), 1) if "\ufffd" in line]
        listed = ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
        return UserError(
            f"{path} line {listed}: {bad} damaged characters; the rest of the file is {name}. "
            "Mend or delete these lines."
        )
    return None


def _foreign(raw: bytes, path: Path) -> UserError:
    """What the bytes may be: a statistical guess is often wrong, so that it is offered and never taken."""
    from charset_normalizer import from_bytes

    start = _first_bad_byte(raw)
    opening = (
        f"{path} line {raw.count(bytes([10]), 0, start) + 1}: the text is neither UTF-8 (byte 0x{raw[start]:02x}) "
        "nor readable as GBK or GB18030. "
    )
    best = from_bytes(raw[max(0, start - _SAMPLE // 2) : start + _SAMPLE // 2]).best()
    if best is None:
        return UserError(f"{opening}Name its encoding (--encoding big5, say), or save it as UTF-8.")
    begin = raw.rfind(b"\n", 0, start) + 1
    shown = raw[max(begin, start - 60) : start + 60].decode(best.encoding, "replace").split("\n")[0].strip()
    return UserError(
        f"{opening}It may be {best.encoding}, which reads {shown[:60]!r} there. If that is right: "
        f"--encoding {best.encoding}; otherwise name the right one, or save the file as UTF-8."
    )


def _first_bad_byte(raw: bytes) -> int:
    """Where the bytes are not UTF-8."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    raise AssertionError("valid UTF-8 does not come here")
