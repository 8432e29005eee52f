"""The values that leave `data`: conversations, preference pairs, token samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LISTED = 1000
"""Rows that a report names one by one; it counts the rest."""
Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Turn:
    """One message. `reasoning` is the text between <think> and </think>; it is not part of `content`."""

    role: Role
    content: str
    reasoning: str | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns in order; a system turn, if any, comes first; the last turn is the assistant's when it is trained on.

    `source` names file and row ("medical.csv:17") for reports and errors.
    """

    turns: tuple[Turn, ...]
    source: str


@dataclass(frozen=True)
class PreferencePair:
    """A prompt (ending in a user turn) with the better and the worse answer."""

    prompt: tuple[Turn, ...]
    chosen: Turn
    rejected: Turn
    source: str


@dataclass(frozen=True)
class TokenSample:
    """One training row. `ids` int32 [T]; `trained` bool [T]: token t is a target (its loss counts)."""

    ids: np.ndarray
    trained: np.ndarray
    source: str


@dataclass(frozen=True)
class TokenPair:
    """Chosen and rejected row of one preference; both open with the same prompt ids."""

    chosen: TokenSample
    rejected: TokenSample


@dataclass
class DataReport:
    """What happened to the rows, for data_report.json and the printed summary."""

    files: list[dict] = field(default_factory=list)
    """Each: path, encoding, format, rows."""
    rows: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    """reason -> rows, e.g. "empty answer"."""
    skipped_examples: list[str] = field(default_factory=list)
    """The first thousand: "file:row reason"."""
    tokens: dict[str, float] = field(default_factory=dict)
    """total, trained, trained_share (0 to 1), mean, p50, p95, max."""
    shortened: int = 0
    dropped_too_long: int = 0
    terms_normalized: int = 0
    duplicates: list[str] = field(default_factory=list)
    """The first thousand: "file:row = file:row", nearly equal ones with ~."""
    leaks: list[str] = field(default_factory=list)
    """The first thousand held-out rows that a training row gives away: "file:row <- file:row (how)"."""
    notes: dict[str, int] = field(default_factory=dict)
    """What was done to used rows or found in them, e.g. "turns of the same role joined"."""
