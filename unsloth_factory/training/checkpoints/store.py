"""Checkpoints of a run folder: whole or not there, never in between.

A save writes into `.tmp-STEP-PID/`, adds a manifest with the SHA-256 of every file, flushes all of it to the disk and
only then renames the folder to `checkpoint-STEP`. Old ones are renamed to `.del-...` before they are deleted. So a kill
at any instant leaves complete checkpoints, plus leftovers that the next start removes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import RunSettings
from unsloth_factory.run.atomic import fsync_path, publish_folder, require_free_space, sha256
from unsloth_factory.run.folder import RunFolder

MANIFEST = "MANIFEST.json"
STATE = "state.json"
LEFTOVERS = (".tmp-*", ".del-*", ".checkpoint-*.partial")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest verified."""

    path: Path
    step: int
    state: dict[str, Any]
    """Contents of state.json."""


@contextmanager
def claim(folder: RunFolder, settings: RunSettings, say: Callable[[str], None] = print) -> Iterator[CheckpointStore]:
    """Hold a run folder for one training; call it before anything slow, so that a refusal comes at once.

    Args:
        folder: The run folder; it is made when missing.
        settings: `resume` and `overwrite` decide what happens to checkpoints that are there.
        say: Prints one line.

    Raises:
        UserError: Another process trains in it, or it holds a training and neither --resume nor --overwrite is given.
        UsageError: Both are given.
    """
    if settings.resume and settings.overwrite:
        raise UsageError(f"--resume {settings.resume} and --overwrite exclude each other: continue, or start anew")
    store = CheckpointStore(folder.path, settings, say)
    if os.environ.get("RANK", "0") != "0":
        yield store  # under `accelerate launch` the first process holds the folder, and alone writes
        return
    with folder.lock():
        store.remove_leftovers()
        found = store.steps()
        results = [path for path in (folder.final_adapter, folder.final_model) if path.exists()]
        if (found or results) and not settings.resume and not settings.overwrite:
            newest = f"checkpoint-{found[-1]}" if found else results[0].name
            raise UserError(
                f"{folder.path} holds an earlier training (newest: {newest}). "
                "Continue it with --resume auto, delete it with --overwrite, or name another --output_dir."
            )
        yield store


class CheckpointStore:
    """The checkpoints of one run folder. Made by `claim`."""

    def __init__(self, folder: Path, settings: RunSettings, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.settings = settings
        self.say = say

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of one step."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints, damaged ones too, in ascending order."""
        matches = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in self.folder.glob("checkpoint-*"))
        return sorted(int(match[1]) for match in matches if match)

    def remove_leftovers(self) -> None:
        """Delete what a killed run left half-written or half-deleted."""
        for pattern in LEFTOVERS:
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def to_resume(self) -> Checkpoint | None:
        """The checkpoint that --resume asks for; None means step 0.

        Raises:
            UserError: The named one is damaged, or all are. Starting again at step 0 must be asked for.
        """
        if self.settings.resume is None:
            return None
        if self.settings.resume != "auto":
            return self._named(Path(self.settings.resume))
        checkpoint = self.newest_intact()
        if checkpoint is None and self.steps():
            raise UserError(
                f"All checkpoints of {self.folder} are damaged. Restore one from a backup, "
                "or start again at step 0 with --overwrite."
            )
        if checkpoint is None:
            self.say(f"--resume auto: {self.folder} has no checkpoint yet; training starts at step 0")
        return checkpoint

    def newest_engine(self) -> str | None:
        """The engine that wrote the newest checkpoint; None where there is none that can be read."""
        for step in reversed(self.steps()):
            try:
                return str(_read(self.path(step), step).state["fingerprint"].get("engine", "standard"))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                continue  # damaged; resuming says so
        return None

    def newest_intact(self) -> Checkpoint | None:
        """The newest checkpoint whose every byte is as it was written; damaged ones are named and skipped."""
        for step in reversed(self.steps()):
            fault = damage(self.path(step))
            if fault is None:
                return _read(self.path(step), step)
            self.say(f"Warning: {self.path(step)} is damaged and is skipped: {fault}")
        return None

    def _named(self, path: Path) -> Checkpoint:
        path = path if path.is_dir() else self.folder / path
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if not path.is_dir() or not match:
            raise UserError(
                f"--resume {self.settings.resume}: no checkpoint folder there. "
                f"Give --resume auto, or the path of a checkpoint-N folder; {self.folder} has {self.steps() or 'none'}."
            )
        fault = damage(path)
        if fault is not None:
            raise UserError(f"--resume {path}: the checkpoint is damaged: {fault}. Try --resume auto.")
        return _read(path, int(match[1]))

    def discard_after(self, step: int) -> None:
        """Delete the checkpoints beyond a step: damaged ones, and those that the run is about to make again."""
        for later in [s for s in self.steps() if s > step]:
            self.say(f"checkpoint-{later} is removed: training continues from step {step} and will make it again")
            self._delete(later)

    def discard_all(self) -> None:
        """Delete all checkpoints (--overwrite)."""
        for step in self.steps():
            self._delete(step)

    def save(
        self,
        step: int,
        write: Callable[[Path], None],
        state: dict[str, Any],
        bytes_needed: int,
        keep: int | None = None,
    ) -> Path:
        """Save one checkpoint, then delete those beyond `save_total_limit`.

        Args:
            step: Optimizer steps done.
            write: Writes the tensor files into the folder that it is given.
            state: Contents of state.json.
            bytes_needed: Estimated size of what `write` writes, bytes.
            keep: Step of a checkpoint that is not deleted, however old it is.

        Raises:
            UserError: The disk is full. The checkpoints before this one are intact.
        """
        temporary = self.folder / f".tmp-{step}-{os.getpid()}"
        self._require_space(step, bytes_needed)
        with disk_errors(f"checkpoint-{step}", self._last_line()):
            try:
                temporary.mkdir(parents=True)
                write(temporary)
                text = json.dumps(state, ensure_ascii=False, indent=2, allow_nan=False)
                (temporary / STATE).write_text(text + "\n", encoding="utf-8")
                (temporary / MANIFEST).write_bytes(_manifest(temporary))
                publish_folder(temporary, self.path(step))
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        for old in self.steps()[: -self.settings.save_total_limit]:
            if old != keep:
                self._delete(old)
        return self.path(step)

    def _require_space(self, step: int, bytes_needed: int) -> None:
        try:
            require_free_space(self.folder, bytes_needed, f"checkpoint-{step}")
        except UserError as error:
            raise UserError(f"Disk full: {error} {self._last_line()}") from error

    def _last_line(self) -> str:
        steps = self.steps()
        if not steps:
            return "No checkpoint had been saved before."
        return f"checkpoint-{steps[-1]} is intact: free some space and continue with --resume auto."

    def _delete(self, step: int) -> None:
        doomed = self.folder / f".del-{step}-{os.getpid()}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(self.path(step), doomed)
        fsync_path(self.folder)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def disk_errors(what: str, next_step: str) -> Iterator[None]:
    """Turn a failed write into a message for the user.

    Raises:
        UserError: Instead of the OSError (or safetensors' own error) of a full or broken disk.
    """
    try:
        yield
    except (OSError, SafetensorError, UserError) as error:
        full = _is_disk_full(error)
        if isinstance(error, UserError) and not full:
            raise
        raise UserError(f"{'Disk full: ' if full else ''}{what} cannot be written ({error}). {next_step}") from error


def _is_disk_full(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, UserError) and error.__cause__ else error
    return getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(cause)


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def _manifest(folder: Path) -> bytes:
    sums = {name: sha256(folder / name) for name in _files(folder)}
    return (json.dumps({"files": sums}, indent=1) + "\n").encode()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None when every file is as it was written.

    The manifest is made again from the files and compared byte by byte, so that damage to itself is seen too.
    """
    try:
        stored = (folder / MANIFEST).read_bytes()
        if stored == _manifest(folder):
            return None
        wanted = json.loads(stored)["files"]
        present = _files(folder)
        for name in wanted:
            if name not in present:
                return f"{name} is missing"
            if sha256(folder / name) != wanted[name]:
                return f"{name} differs from its SHA-256 in {MANIFEST}"
        return f"its files and {MANIFEST} do not agree"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is unreadable"


def _read(path: Path, step: int) -> Checkpoint:
    return Checkpoint(path, step, json.loads((path / STATE).read_text(encoding="utf-8")))
