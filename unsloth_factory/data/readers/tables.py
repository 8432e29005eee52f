"""csv and tsv, parquet, xlsx: files with a header."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers.table import Row

MAX_UNPACKED, MAX_PARTS = 2**30, 10_000  # of an xlsx file; a sheet of a million long rows has half of that


def read_csv(text: str, path: Path, delimiter: str | None = None, header: Sequence[str] | None = None) -> Iterator[Row]:
    """Rows of delimited text; row numbers are the lines on which they begin.

    Args:
        text: The whole file, line ends untouched.
        path: For messages.
        delimiter: None picks comma, semicolon or tab, whichever the header has most of; comma where there is none.
        header: Names of the columns of a file without a header.

    Raises:
        UserError: No header, or a quote that is never closed. A row with too many or too few fields is a problem of
            that row alone.
    """
    first = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = delimiter or ("," if header else max(",;\t", key=first.count))
    # The limit of 128 KiB a field is a setting of the whole process: it is put back when the file is read.
    limit = csv.field_size_limit(sys.maxsize)
    try:
        # An unclosed quote swallows the rest of the file, and only strict mode says so.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        yield from _csv_rows(reader, path, list(header) if header else None)
    finally:
        csv.field_size_limit(limit)


def _csv_rows(reader: Any, path: Path, header: list[str] | None) -> Iterator[Row]:
    while True:
        line = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                raise UserError(
                    f"{path} line {line}: the quote opened in this row is never closed. "
                    'Close it; a quote inside a quoted field is written twice ("").'
                ) from None
            yield Row(line, None, f"broken csv ({error})")
            continue
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            header = _header(fields, path)
        elif len(fields) != len(header):
            yield Row(line, None, f"{len(fields)} fields where the header has {len(header)}")
        elif any("\0" in field for field in fields):
            yield Row(line, None, "a NUL character in the text")
        else:
            yield Row(line, dict(zip(header, fields, strict=True)))


def read_parquet(path: Path) -> Iterator[Row]:
    """Rows of a parquet file, by batches.

    Raises:
        UserError: The file is not parquet or is cut off.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        # 1,024 rows: a dictionary-encoded column of long texts is a hundred times its size when written out.
        for batch in file.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(number, values)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable parquet file ({error}). Write or download it again.") from None


def read_xlsx(path: Path) -> Iterator[Row]:
    """Rows of the first sheet; numbers are those that the spreadsheet shows.

    Raises:
        UserError: openpyxl is missing, or the file is not a workbook.
    """
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"{path}: reading Excel files needs openpyxl. Install it: pip install unsloth-factory[excel]"
        ) from None
    import zipfile
    import zlib
    from xml.etree.ElementTree import ParseError

    damaged = (zipfile.BadZipFile, zlib.error, ParseError, openpyxl.utils.exceptions.InvalidFileException)
    try:
        _refuse_bomb(path)
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            yield from _sheet_rows(book, path)
        finally:
            book.close()
    except UserError:
        raise
    except (*damaged, KeyError, OSError, ValueError, TypeError, AttributeError, IndexError, EOFError) as error:
        # openpyxl lets whatever a malformed part of the archive runs into through.
        raise UserError(f"{path}: not a readable xlsx workbook ({error}). Save it again as .xlsx or .csv.") from None


def _refuse_bomb(path: Path) -> None:
    """A workbook is a zip archive, and its texts are read whole: a small file must not become many gigabytes."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    unpacked = sum(part.file_size for part in parts)  # zipfile stops reading a part there, whatever comes after
    if unpacked > MAX_UNPACKED or len(parts) > MAX_PARTS:
        raise UserError(
            f"{path}: {len(parts):,} parts of {unpacked / 2**20:,.0f} MiB together when unpacked; at most "
            f"{MAX_PARTS:,} and {MAX_UNPACKED / 2**20:,.0f} MiB are read. Save the table as .csv."
        )


def _sheet_rows(book: Any, path: Path) -> Iterator[Row]:
    if not book.worksheets:
        raise UserError(f"{path}: the workbook has no sheet of cells. Save the table as .csv.")
    sheet = book.worksheets[0]
    # Programs write wrong sizes, up to 16,384 columns for three; without them each row is as long as its cells.
    sheet.reset_dimensions()
    header: list[str] | None = None
    for number, cells in enumerate(sheet.iter_rows(values_only=True), 1):
        if all(cell is None or not str(cell).strip() for cell in cells):
            continue
        if header is None:
            header = _header(["" if cell is None else str(cell) for cell in cells], path)
            continue
        # Cells right of the header are None or notes that belong to no column; missing ones at the end are empty.
        padded = [*cells, *[None] * (len(header) - len(cells))]
        yield Row(number, {name: cell for name, cell in zip(header, padded, strict=False) if name})


def _header(fields: Sequence[str], path: Path) -> list[str]:
    names = [field.strip() for field in fields]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header has the column {', '.join(twice)} twice. Rename one of them.")
    return names
