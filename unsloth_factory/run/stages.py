"""The stage cache of a plan: a stage with unchanged inputs whose outputs are still there is not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.run.atomic import sha256, write_json

# Larger files are known by size and both ends: hashing 16 GB of weights would cost more than most stages.
WHOLE_FILE_LIMIT = 256 << 20
END_BYTES = 1 << 20


@dataclass(frozen=True)
class StageCache:
    """Records of finished stages, in one JSON file."""

    path: Path

    def hit(self, stage: str, key: str) -> dict[str, Any] | None:
        """The record of a finished run of `stage` with this input key, if all its outputs are still as they were."""
        record = self._records().get(stage)
        if record is None or record["key"] != key:
            return None
        same = all(file_identity(Path(name)) == identity for name, identity in record["outputs"].items())
        return record if same else None

    def store(self, stage: str, key: str, outputs: Iterable[Path], figures: dict[str, Any]) -> None:
        """Remember a finished stage with the identity of every file it made."""
        records = self._records()
        files = {str(path): file_identity(path) for path in files_below(outputs)}
        records[stage] = {"key": key, "outputs": files, "figures": figures}
        write_json(self.path, records)

    def forget(self, stage: str) -> dict[str, Any] | None:
        """Drop a record, before the stage's outputs are made anew, and return it."""
        records = self._records()
        record = records.pop(stage, None)
        if record is not None:
            write_json(self.path, records)
        return record

    def _records(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path} is damaged ({error}); delete it to run all stages again") from error


def stage_key(command: str, values: dict[str, Any], inputs: Iterable[Path], upstream: Iterable[str]) -> str:
    """Hash of everything that decides a stage's result.

    Args:
        command: Name of the stage's command.
        values: All its settings, flat.
        inputs: Files and folders it reads; their content counts, not their dates.
        upstream: Keys of the stages whose results it uses.
    """
    digest = hashlib.sha256()
    files = {str(path): file_identity(path) for path in files_below(inputs)}
    digest.update(json.dumps([command, values, files, list(upstream)], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files themselves, and all files below the folders, sorted."""
    found: set[Path] = set()
    for path in paths:
        found.update([path] if path.is_file() else (p for p in path.rglob("*") if p.is_file()))
    return sorted(found)


def file_identity(path: Path) -> str:
    """SHA-256 of a file, or of size and both ends when it is larger than 256 MiB; "missing" when it is not there."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    if size <= WHOLE_FILE_LIMIT:
        return sha256(path)
    with open(path, "rb") as file:
        head = file.read(END_BYTES)
        file.seek(size - END_BYTES)
        return hashlib.sha256(f"{size}".encode() + head + file.read()).hexdigest()
