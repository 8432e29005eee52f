"""Files to rows: json, jsonl, csv, tsv, txt, parquet, xlsx; the content decides where it contradicts the name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers.encoding import decode
from unsloth_factory.data.readers.json_files import read_json
from unsloth_factory.data.readers.table import Row, Table
from unsloth_factory.data.readers.tables import read_csv, read_parquet, read_xlsx
from unsloth_factory.data.readers.text import read_blocks

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt", ".parquet", ".xlsx")

__all__ = ["SUFFIXES", "Row", "Table", "read_table"]


def read_table(path: Path, encoding: str = "auto") -> Table:
    """All rows of one file.

    Args:
        path: The file.
        encoding: "auto", or a codec name.

    Raises:
        UserError: The file is empty, of an unknown kind, damaged or in an unknown encoding; names the place.
    """
    suffix = path.suffix.lower()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    if not raw.strip():
        raise UserError(f"{path} is empty. Check that it was written or downloaded completely.")
    if raw.startswith(b"PAR1") or suffix == ".parquet":
        return _table(path, "parquet", None, read_parquet(path))
    if raw.startswith(b"PK\x03\x04") or suffix == ".xlsx":
        return _table(path, "xlsx", None, read_xlsx(path))
    if suffix not in SUFFIXES:
        hint = " Save it as .xlsx." if suffix == ".xls" else ""
        raise UserError(f"{path}: files of type {suffix or 'none'} are not read. Known: {' '.join(SUFFIXES)}.{hint}")
    text, name = decode(raw, path, encoding)
    if not text.strip():
        raise UserError(f"{path} is empty. Check that it was written or downloaded completely.")
    if suffix in JSON_SUFFIXES:
        kind, rows = read_json(text, path)
        return _table(path, kind, name, rows)
    if suffix == ".txt":
        return _table(path, "txt", name, read_blocks(text, path))
    return _table(path, suffix[1:], name, read_csv(text, path, "\t" if suffix == ".tsv" else None))


def _table(path: Path, kind: str, encoding: str | None, rows: Iterator[Row]) -> Table:
    table = Table(path, kind, encoding, tuple(rows))
    if not table.rows:
        raise UserError(f"{path} has no rows. Check that it was written or downloaded completely.")
    return table
