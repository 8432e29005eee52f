"""Write files so that a reader sees the old state or the new one, never a mash-up.

Everything goes to a temporary sibling first, is flushed to the disk, and is then renamed; the rename and the folder
entry are flushed as well. A folder changes places with its predecessor in one step of the kernel. What a crash leaves
behind carries a name that starts with a dot and ends in `.partial`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from unsloth_factory.config.errors import UserError

SUMS_NAME = "SHA256SUMS"
SUFFIX = ".partial"
# A file name has at most 255 bytes; a temporary one needs some of them for itself.
LONGEST_STEM = 180
WAIT_SECONDS = 5.0
AT_FDCWD, RENAME_EXCHANGE = -100, 2
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


def _stem(path: Path) -> str:
    """The opening of the temporary names of `path`."""
    if len(os.fsencode(path.name)) <= LONGEST_STEM:
        return f".{path.name}"
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}"


def partial(path: Path) -> Path:
    """The temporary sibling of `path`; it is on the same file system, so that the rename is atomic."""
    return path.with_name(f"{_stem(path)}{SUFFIX}")


def own_partial(path: Path) -> Path:
    """A temporary sibling of this process alone: a child that outlives a killed parent must not write into ours."""
    return path.with_name(f"{_stem(path)}.{os.getpid()}{SUFFIX}")


def remove_leftovers(path: Path) -> None:
    """Delete what killed writers of `path` left behind; only for who holds the folder (`exclusive`, `RunFolder.lock`).

    A folder that was moved away for its successor, which then never came, gets its name back.
    """
    old = _moved_away(path)
    if not os.path.lexists(path) and os.path.lexists(old):
        os.replace(old, path)
    for leftover, writer in _leftovers(path):
        if writer is None or leftover == own_partial(path) or not _is_alive(writer):
            discard(leftover)


def _leftovers(path: Path) -> list[tuple[Path, int | None]]:
    """(temporary file or folder of `path`, process id of its writer where the name tells it)."""
    pattern = re.compile(rf"{re.escape(_stem(path))}(\.old|\.(?P<writer>\d+)(\.\w+)?)?{re.escape(SUFFIX)}")
    try:
        matches = [pattern.fullmatch(name) for name in os.listdir(path.parent)]
    except FileNotFoundError:
        return []
    return [(path.with_name(m[0]), int(m["writer"]) if m["writer"] else None) for m in matches if m]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True


def discard(path: Path) -> None:
    """Delete a file, a link or a folder if it is there; what cannot be deleted stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def exclusive(folder: Path, what: str) -> Iterator[int]:
    """Hold a folder (it is made when missing) against a second program; the kernel frees it however this one ends.

    Gives the descriptor of the lock. A child that inherits it holds the folder for as long as it lives: what a killed
    parent left behind cannot write beside its successor, which waits for it a few seconds.

    Raises:
        UserError: Another program holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"{folder} cannot be used ({error.strerror}). Name a folder that can be written.") from error
    try:
        if not _locked(descriptor, time.monotonic() + WAIT_SECONDS):
            raise UserError(f"Another program is writing into {folder}. Wait for it, then start {what} again.")
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int, deadline: float) -> bool:
    """Lock a folder's descriptor; false when another process holds it until the deadline."""
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError:
            return True  # a file system without locks: the temporary names still keep two writers apart
        else:
            return True


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


def public_mode() -> int:
    """Mode of a file that is made in the ordinary way: readable as the user's umask says.

    safetensors creates files with mode 0600: a server under another user could not read the model.
    """
    return 0o666 & ~_umask()


def _umask() -> int:
    with suppress(OSError), open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))
    mask = os.umask(0o077)  # elsewhere it can be read by setting it only, which other threads would notice
    os.umask(mask)
    return mask


def publish_file(temporary: Path, final: Path) -> Path:
    """Give a finished temporary file its final name, replacing what was there."""
    os.chmod(temporary, public_mode())
    fsync_path(temporary)
    os.replace(temporary, final)
    fsync_path(final.parent)
    return final


def publish_folder(temporary: Path, final: Path) -> Path:
    """Give a finished temporary folder its final name; an older folder of that name changes places, then is deleted."""
    mode = public_mode()
    for path in temporary.rglob("*"):
        if path.is_file():
            os.chmod(path, mode)
    fsync_tree(temporary)
    if not os.path.lexists(final):
        os.replace(temporary, final)
    elif not _exchange(temporary, final):
        _replace_in_two(temporary, final)
    fsync_path(final.parent)
    discard(temporary)
    return final


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (renameat2 of Linux); false where kernel or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _moved_away(final: Path) -> Path:
    return final.with_name(f"{_stem(final)}.old{SUFFIX}")


def _replace_in_two(temporary: Path, final: Path) -> None:
    """Move the old folder away and the new one in; a failure in between is undone (a crash: `remove_leftovers`)."""
    old = _moved_away(final)
    discard(old)
    os.replace(final, old)
    try:
        os.replace(temporary, final)
    except BaseException:
        os.replace(old, final)
        raise
    discard(old)


def write_bytes(path: Path, data: bytes) -> Path:
    """Write a file atomically; the folder is made when it is missing.

    The temporary file is made anew, with a name of its own: nothing that lies there, a link say, is written through.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover, writer in _leftovers(path):
            if writer is not None and not _is_alive(writer):
                discard(leftover)
        descriptor, name = tempfile.mkstemp(SUFFIX, f"{_stem(path)}.{os.getpid()}.", path.parent)
        temporary = Path(name)
        with open(descriptor, "wb") as file:
            file.write(data)
        return publish_file(temporary, path)
    except OSError as error:
        if temporary is not None:
            discard(temporary)
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
    for name, digests in read_sums(folder).items():
        path = folder / name
        if not _stays_inside(name) or not path.is_file() or sha256(path) not in digests:
            bad.append(name)
    return bad


def _stays_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def read_sums(folder: Path) -> dict[str, set[str]]:
    """Name -> digests of the folder's SHA256SUMS (two while a file is being replaced); empty when there is none."""
    path = folder / SUMS_NAME
    sums: dict[str, set[str]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        digest, _, name = line.partition("  ")
        if name:
            sums.setdefault(name, set()).add(digest)
    return sums


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
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
