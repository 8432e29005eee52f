"""metrics.jsonl, one line per optimizer step, and its like: without gaps or doubles whatever stopped the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from unsloth_factory.training.checkpoints.store import disk_errors


class MetricsLog:
    """Appends lines; a resumed run first cuts the file back to where its checkpoint was taken."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def start(self, offset: int, say: Callable[[str], None]) -> None:
        """Cut the file to `offset` bytes (0 for a new run)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if offset == 0 and not self.path.exists():
            return
        with open(self.path, "ab") as file:
            size = file.tell()
            if size < offset:
                say(f"Warning: {self.path} is shorter than the checkpoint expects; some of its lines are lost")
                offset = _last_line_end(self.path)
            file.truncate(offset)

    def lines_after(self, offset: int) -> int:
        """Lines beyond `offset` bytes."""
        if not self.path.exists():
            return 0
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read().count(b"\n")

    def append(self, *lines: dict[str, Any]) -> None:
        """Add lines, all of them with one write."""
        text = "".join(_json_line(line) for line in lines)
        way_out = "Free some space and continue with --resume auto."
        with disk_errors(str(self.path), way_out), open(self.path, "ab") as file:
            file.write(text.encode())

    def flush(self) -> int:
        """Flush the lines to the disk; returns the file's size in bytes, which a checkpoint notes."""
        if not self.path.exists():
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        with open(self.path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]


def _last_line_end(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _json_line(line: dict[str, Any]) -> str:
    values = {key: _short(value) for key, value in line.items()}
    return json.dumps(values, allow_nan=False, ensure_ascii=False) + "\n"


def _short(value: Any) -> Any:
    # JSON has no NaN: a skipped step's loss is null
    if isinstance(value, float):
        return float(f"{value:.7g}") if abs(value) < float("inf") else None
    return value
