"""Write files so that a reader sees the old state or the new one, never a mash-up.

Everything goes to a temporary sibling first, is flushed to the disk, and is then renamed; the rename and the folder
entry are flushed as well. What a crash leaves behind carries a name that starts with a dot and ends in `.partial`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

SUMS_NAME = "SHA256SUMS"
# safetensors 0.8 creates files with mode 0600: a server under another user could not read the model.
PUBLIC_MODE = 0o644


def partial(path: Path) -> Path:
    """The temporary sibling of `path`; it is on the same file system, so that the rename is atomic."""
    return path.with_name(f".{path.name}.partial")


def fsync_path(path: Path) -> None:
    """Flush one file, or one folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder`, then the folders from the inside out."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            fsync_path(Path(root, name))
        fsync_path(Path(root))


def publish_file(temporary: Path, final: Path) -> Path:
    """Give a finished temporary file its final name, replacing what was there."""
    os.chmod(temporary, PUBLIC_MODE)
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)
    return final


def publish_folder(temporary: Path, final: Path) -> Path:
    """Give a finished temporary folder its final name; an older folder of that name is moved away, then deleted."""
    for path in temporary.rglob("*"):
        if path.is_file():
            os.chmod(path, PUBLIC_MODE)
    fsync_tree(temporary)
    doomed = final.with_name(f".{final.name}.old.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():
        os.replace(final, doomed)
    os.replace(temporary, final)
    fsync_path(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)
    return final


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file atomically; the folder is made when it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial(path)
    try:
        temporary.write_bytes(data)
        return publish_file(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 text file atomically."""
    return write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> Path:
    """Write a value as indented JSON, atomically; non-finite numbers are refused (they are not JSON)."""
    return write_text(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> Path:
    """Write SHA256SUMS over the named files of `folder`, in the format of `sha256sum -c`."""
    return write_text(folder / SUMS_NAME, "".join(f"{sha256(folder / name)}  {name}\n" for name in sorted(names)))


def verify_sums(folder: Path) -> list[str]:
    """Names of the files below `folder` that are missing or differ from its SHA256SUMS; empty when all is well."""
    bad = []
    for line in (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            bad.append(name)
    return bad


def require_free_space(folder: Path, bytes_needed: int, what: str) -> None:
    """Refuse to start a write that cannot fit.

    Args:
        folder: Where it will be written; the nearest existing parent is asked.
        bytes_needed: Size of everything that `what` writes, bytes.
        what: What would be written, for the message.

    Raises:
        UserError: The file system has less free space than that.
    """
    existing = folder.resolve()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < bytes_needed:
        raise UserError(
            f"{what} needs {bytes_needed / 2**30:.2f} GiB in {folder}, {free / 2**30:.2f} GiB are free. "
            "Free some space or name another folder."
        )
