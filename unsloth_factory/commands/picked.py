"""Which quantised file of a run the quality gate picked: written by the gate, read by `uf deploy`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import GateSettings
from unsloth_factory.evaluation.quality.gate import MEASURES, FileQuality
from unsloth_factory.run.atomic import write_json
from unsloth_factory.run.folder import RunFolder


def write_pick(folder: RunFolder, gate: GateSettings, picked: FileQuality | None) -> Path:
    """Record the gate's outcome; `picked` is None when no file passed."""
    record: dict[str, Any] = {"gate": gate.gate, "measure": gate.gate_measure, "file": None}
    if picked:
        path, root = Path(picked.path).resolve(), folder.path.resolve()
        inside = path.is_relative_to(root)  # so that the run folder can be moved
        record["file"] = path.relative_to(root).as_posix() if inside else str(path)
        record |= {"sha256": picked.sha256, "bytes": picked.bytes, "loss": vars(picked.losses[gate.gate_measure])}
    return write_json(folder.picked_file, record)


@dataclass(frozen=True)
class Pick:
    """The file that passed, and the gate in words."""

    path: Path
    sha256: str
    what: str


def read_pick(folder: RunFolder) -> Pick | None:
    """The picked file, None where no gate was asked for.

    Raises:
        UserError: No file passed the gate, or the picked one is gone.
    """
    if not folder.picked_file.is_file():
        return None
    again = f"uf quality --run {folder.path} --gate LIMIT"
    try:
        record = json.loads(folder.picked_file.read_text(encoding="utf-8"))
        what = f"{MEASURES[record['measure']]} of at most {record['gate']:g}"
        name, digest = record["file"], record["sha256"] if record["file"] else ""
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.picked_file} is damaged ({error!r}). Judge again: {again}, or give --gguf.") from None
    if name is None:
        raise UserError(
            f"No quantised file of {folder.path} passed its quality gate ({what}). Give the file to serve with --gguf, "
            f"or judge again: {again}."
        )
    path = folder.path / name
    if not path.is_file():
        raise UserError(f"{path}, which the quality gate picked, is gone. Judge again: {again}, or give --gguf.")
    return Pick(path, digest, what)


def require_judged(folder: RunFolder, sha256: str) -> None:
    """Refuse a file that is not the one that the gate measured, where there was a gate.

    Raises:
        UserError: It was made anew since.
    """
    picked = read_pick(folder)
    if picked and picked.sha256 != sha256:
        raise UserError(
            f"{picked.path} is not the file that the quality gate measured: it was made anew since. Judge again: "
            f"uf quality --run {folder.path} --gate LIMIT, or give --gguf."
        )
