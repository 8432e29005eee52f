"""SHA256SUMS over what ships: the only guard against flipped bytes, which every GGUF loader accepts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.run.atomic import SUMS_NAME, publish_file, read_sums, sha256, write_text


def write_folder_sums(folder: Path, names: Iterable[str], *, known: dict[str, str] | None = None) -> None:
    """Write SHA256SUMS with the named files added or renewed; entries of files that are gone are dropped.

    Args:
        folder: Where the file lies; names are relative to it.
        names: Files to hash.
        known: Digests that need no hashing again.
    """
    new = {name: {digest} for name, digest in (known or {}).items()}
    new |= {name: {sha256(folder / name)} for name in names}
    kept = {name: digests for name, digests in read_sums(folder).items() if (folder / name).is_file()}
    _write(folder, kept | new)


def _write(folder: Path, sums: dict[str, set[str]]) -> None:
    sums.pop(SUMS_NAME, None)
    lines = [f"{digest}  {name}\n" for name, digests in sorted(sums.items()) for digest in sorted(digests)]
    write_text(folder / SUMS_NAME, "".join(lines))


def publish_with_sum(temporary: Path, final: Path) -> None:
    """Give a finished file its name and its line in SHA256SUMS.

    The new digest is added before the file changes and the old one dropped after: at every instant the file agrees
    with one of its lines, also when the process is killed in between.
    """
    digest = sha256(temporary)
    sums = {name: found for name, found in read_sums(final.parent).items() if (final.parent / name).is_file()}
    before = sums.get(final.name, {sha256(final)} if final.is_file() else set())
    _write(final.parent, sums | {final.name: before | {digest}})
    publish_file(temporary, final)
    _write(final.parent, sums | {final.name: {digest}})


def verify_file(path: Path) -> str:
    """Digest of a file, compared with the SHA256SUMS beside it when that names it.

    Raises:
        UserError: The file is not the one that was written, or it is not there.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing. Give the path of a GGUF file, or make one with uf gguf.")
    digest = sha256(path)
    wanted = read_sums(path.parent).get(path.name)
    if wanted is not None and digest not in wanted:
        raise UserError(
            f"{path} is not the file that was exported: its SHA-256 differs from {SUMS_NAME}. Copy it again, or make "
            "it again (uf gguf, uf quantize)."
        )
    return digest
