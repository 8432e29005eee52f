"""What every reader returns: rows with their place in the file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One row. `number` is its line (JSON lines, csv, txt), or its place (a JSON array's item, a sheet's row).

    `values` is None where the row could not be read; `problem` then says why.
    """

    number: int
    values: dict[str, Any] | None
    problem: str | None = None


@dataclass(frozen=True)
class Table:
    """The rows of one file, in order."""

    path: Path
    kind: str
    """json, jsonl, csv, tsv, txt, parquet or xlsx: what the file is, whatever its name says."""
    encoding: str | None
    rows: tuple[Row, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """All column names, in the order in which they first appear."""
        return tuple(dict.fromkeys(name for values in self.readable() for name in values))

    def readable(self) -> Iterator[dict[str, Any]]:
        """The values of the rows that could be read."""
        return (row.values for row in self.rows if row.values is not None)
