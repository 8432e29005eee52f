"""Loose text: question line, answer lines, blank lines between the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers.table import Row


def read_blocks(text: str, path: Path) -> Iterator[Row]:
    """One row {question, answer} per block of lines; a block of one line has no answer.

    Raises:
        UserError: The text is not cut into blocks: running text, not questions and answers.
    """
    blocks: list[tuple[int, list[str]]] = []
    inside = False
    for number, line in enumerate(text.split("\n"), 1):
        line = line.strip()
        if line and not inside:
            blocks.append((number, []))
        if line:
            blocks[-1][1].append(line)
        inside = bool(line)
    if len(blocks) == 1 and len(blocks[0][1]) > 2:
        raise UserError(
            f"{path}: {len(blocks[0][1])} lines without a blank line between them are running text, not samples. "
            "Write each sample as a question line, answer lines and a blank line, or use json, jsonl or csv."
        )
    return (_row(number, block) for number, block in blocks)


def _row(number: int, block: list[str]) -> Row:
    if len(block) == 1:
        return Row(number, None, "a question line without an answer line")
    return Row(number, {"question": block[0], "answer": "\n".join(block[1:])})
