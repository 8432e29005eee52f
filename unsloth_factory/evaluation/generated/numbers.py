"""The number that an answer ends in, exactly: 1,200 = 1200.0 = １２００, and 0.5 = 1/2."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
# A minus behind a digit, letter or bracket is a difference or a range, not a sign.
_NUMBER = rf"(?:(?<![\w)\].])[-+]\s?)?[$¥€£]?\s?(?:(?<=[$¥€£])-)?(?:{_DIGITS})(?:/\d+)?"
_NAMED = re.compile(
    rf"(?:####|\\boxed\s*\{{|\banswer\s*(?:is|:|=)|答案\s*(?:是|为|:|=))[^\d\n]{{0,12}}?({_NUMBER})", re.IGNORECASE
)
_ANY = re.compile(_NUMBER)


def final_number(text: str) -> Fraction | None:
    r"""The number that the text names as its answer, else its last number; None without one.

    `#### 18`, `\boxed{18}`, `the answer is 18`, `答案：18` name one; the last that is named counts. Signs of
    currencies, separators of thousands and full-width digits do not matter. Units and percent signs are not converted.
    """
    plain = unicodedata.normalize("NFKC", text).replace("−", "-")
    named = _NAMED.findall(plain)
    found = named or _ANY.findall(plain)
    return _value(found[-1]) if found else None


def _value(written: str) -> Fraction | None:
    try:
        return Fraction(re.sub(r"[^\d./-]", "", written))
    except (ValueError, ZeroDivisionError):
        return None
