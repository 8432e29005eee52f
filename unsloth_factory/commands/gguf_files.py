"""The GGUF files that a command was given, and what reports call them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.commands.source import ResolvedModel
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.gguf_header import GgufHeader


def gguf_paths(wanted: str, resolved: ResolvedModel) -> list[Path]:
    """Files by commas, or all of the run folder, the largest first: 16 bit, then ever smaller.

    Raises:
        UsageError: `all` without a run.
        UserError: The run has none.
    """
    if wanted != "all":
        named = [Path(part.strip()).expanduser() for part in wanted.split(",") if part.strip()]
        if not named:
            raise UsageError(f"--gguf {wanted!r} names no file.")
        return list(dict.fromkeys(named))
    if resolved.folder is None:
        raise UsageError("--gguf all takes the files of a run folder. Give --run FOLDER, or the files by name.")
    found = sorted(resolved.folder.gguf.glob("*.gguf"), key=lambda path: -path.stat().st_size)
    if not found:
        raise UserError(f"{resolved.folder.gguf} has no GGUF file. Make one: uf gguf --run {resolved.folder.path}")
    return found


def gguf_variants(paths: Sequence[Path]) -> dict[str, Path]:
    """Files by their type, the end of their name; by their whole name where two have the same type."""
    types = [path.stem.rsplit("-", 1)[-1] for path in paths]
    counts = Counter(types)
    names = [kind if counts[kind] == 1 else path.stem for kind, path in zip(types, paths, strict=True)]
    if len(set(names)) < len(names):  # the same name in two folders
        names = [str(path) for path in paths]
    return dict(zip(names, paths, strict=True))


def described_files(files: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What a report says of each variant's file: path, bytes, sha256.

    Raises:
        UserError: A file is not there, or not the one that was exported.
    """
    digests = {name: verify_file(path) for name, path in files.items()}
    return {
        name: {"path": str(path), "bytes": path.stat().st_size, "sha256": digests[name]} for name, path in files.items()
    }


def shortest_context(headers: Sequence[GgufHeader]) -> int:
    """Positions, tokens, that every one of the models has."""
    contexts = [h.metadata.get(f"{h.metadata.get('general.architecture')}.context_length") for h in headers]
    return min(int(context) if context else 2**31 for context in contexts)
