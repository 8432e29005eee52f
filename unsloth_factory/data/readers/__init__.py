"""Files to rows: json, jsonl, csv, tsv, txt, parquet, xlsx; the content decides where it contradicts the name."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers.encoding import decode
from unsloth_factory.data.readers.json_files import read_json
from unsloth_factory.data.readers.table import Row, Table
from unsloth_factory.data.readers.tables import read_csv, read_parquet, read_xlsx
from unsloth_factory.data.readers.text import read_blocks

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".txt", ".parquet", ".xlsx")

# Bytes, text, rows, conversations together: at their peak 3.0 (Chinese) to 3.8 (English) times a jsonl file of 100 MiB.
MEMORY_FACTOR = 4
_OTHER_KINDS = {
    b"\x1f\x8b": ("compressed with gzip", "Unpack it first: gunzip FILE."),
    b"BZh": ("compressed with bzip2", "Unpack it first: bunzip2 FILE."),
    b"\xfd7zXZ\x00": ("compressed with xz", "Unpack it first: unxz FILE."),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "Unpack it first: unzstd FILE."),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it first."),
    b"Rar!\x1a\x07": ("a rar archive", "Unpack it first."),
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": ("an old Excel or Word file", "Save it as .xlsx or .csv."),
    b"%PDF-": ("a PDF", "Take the questions and answers out of it into json, jsonl or csv."),
    b"GGUF": ("a GGUF model", "Give data to --dataset and the model to --model."),
    b"SQLite format 3\x00": ("an SQLite database", "Export its table as csv."),
}

__all__ = ["SUFFIXES", "Row", "Table", "read_table"]


def read_table(
    path: Path, encoding: str = "auto", *, skip_broken: bool = False, header: Sequence[str] | None = None
) -> Table:
    """All rows of one file.

    Args:
        path: The file.
        encoding: "auto", or a codec name.
        skip_broken: Broken JSON is a problem of its row; otherwise it refuses the file, which may be incomplete.
        header: Names of the columns of a csv or tsv file that has none; its first line is then a row.

    Raises:
        UserError: The file is empty, of an unknown kind, damaged or in an unknown encoding; names the place.
    """
    suffix = path.suffix.lower()
    raw = _read_bytes(path)
    if not raw.strip():
        raise UserError(f"{path} is empty. Check that it was written or downloaded completely.")
    if raw.startswith(b"PAR1") or suffix == ".parquet":
        return _table(path, "parquet", None, read_parquet(path))
    if raw.startswith(b"PK\x03\x04") or suffix == ".xlsx":
        return _table(path, "xlsx", None, read_xlsx(path))
    _refuse_other_kinds(raw, path, suffix)
    text, name = decode(raw, path, encoding)
    del raw
    if not text.strip():
        raise UserError(f"{path} is empty. Check that it was written or downloaded completely.")
    if suffix in JSON_SUFFIXES:
        kind, rows = read_json(text, path, skip_broken=skip_broken)
        return _table(path, kind, name, rows)
    if suffix == ".txt":
        return _table(path, "txt", name, read_blocks(text, path))
    return _table(path, suffix[1:], name, read_csv(text, path, "\t" if suffix == ".tsv" else None, header))


def _read_bytes(path: Path) -> bytes:
    """The file's bytes, if it is a file and fits into memory.

    Raises:
        UserError: A pipe or device (reading it may never end), too large, or the system refuses.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file. Write its content to a file and give that.")
        free = psutil.virtual_memory().available
        if status.st_size * MEMORY_FACTOR > free:
            raise UserError(
                f"{path} has {status.st_size / 2**30:.1f} GiB; reading it takes about {MEMORY_FACTOR} times as much "
                f"memory, and {free / 2**30:.1f} GiB are free. Split it, or take a part of it."
            )
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None


def _refuse_other_kinds(raw: bytes, path: Path, suffix: str) -> None:
    """Refuse names and contents of other kinds.

    Raises:
        UserError: With the way to a kind that is read, where there is one.
    """
    for magic, (kind, advice) in _OTHER_KINDS.items():
        if raw.startswith(magic):
            raise UserError(f"{path} is {kind}. {advice}")
    if suffix not in SUFFIXES:
        raise UserError(f"{path}: files of type {suffix or 'none'} are not read. Known: {' '.join(SUFFIXES)}.")


def _table(path: Path, kind: str, encoding: str | None, rows: Iterator[Row]) -> Table:
    table = Table(path, kind, encoding, tuple(rows))
    if not table.rows:
        raise UserError(f"{path} has no rows. Check that it was written or downloaded completely.")
    return table
