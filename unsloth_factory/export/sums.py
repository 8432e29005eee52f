"""SHA256SUMS over what ships: the only guard against flipped bytes, which every GGUF loader accepts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.run.atomic import SUMS_NAME, sha256, write_text


def read_sums(folder: Path) -> dict[str, str]:
    """Name -> digest of the folder's SHA256SUMS; empty when there is none."""
    path = folder / SUMS_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def write_folder_sums(folder: Path, names: Iterable[str], *, known: dict[str, str] | None = None) -> None:
    """Write SHA256SUMS with the named files added or renewed; entries of files that are gone are dropped.

    Args:
        folder: Where the file lies; names are relative to it.
        names: Files to hash.
        known: Digests that need no hashing again.
    """
    sums = {name: digest for name, digest in read_sums(folder).items() if (folder / name).is_file()}
    sums.update(known or {})
    sums.update({name: sha256(folder / name) for name in names})
    sums.pop(SUMS_NAME, None)
    write_text(folder / SUMS_NAME, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))


def verify_file(path: Path) -> str:
    """Digest of a file, compared with the SHA256SUMS beside it when that names it.

    Raises:
        UserError: The file is not the one that was written.
    """
    digest = sha256(path)
    wanted = read_sums(path.parent).get(path.name)
    if wanted is not None and wanted != digest:
        raise UserError(
            f"{path} is not the file that was exported: its SHA-256 differs from {SUMS_NAME}. Copy it again, or make "
            "it again (uf gguf, uf quantize)."
        )
    return digest
