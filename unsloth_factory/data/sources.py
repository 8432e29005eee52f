"""--dataset to files: paths, folders, names of a dataset_info.json, `file#N`, several by commas."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import DataSettings
from unsloth_factory.data.formats import Tags
from unsloth_factory.data.readers import SUFFIXES
from unsloth_factory.data.types import Role

REGISTRY = "dataset_info.json"
_HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_FORMATTING = {"alpaca": None, "sharegpt": None, "openai": "messages"}
_ROLE_TAGS: Mapping[str, Role] = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
}


@dataclass(frozen=True)
class Source:
    """One file and how it is read."""

    path: Path
    limit: int | None = None
    """First rows only."""
    shape: str | None = None
    """Name of a shape; None looks at the columns."""
    columns: Mapping[str, str] | None = None
    """role -> column."""
    tags: Tags = field(default_factory=Tags)


def resolve(settings: DataSettings) -> list[Source]:
    """The files of --dataset, in the order given.

    Raises:
        UserError: Nothing is there (near names are listed), a registry entry is on a hub, or the registry is broken.
    """
    if not settings.dataset:
        raise UserError("No --dataset: give a file, a folder, or names of dataset_info.json.")
    whole = _find_path(settings.dataset, settings.dataset_dir)
    specs = [settings.dataset] if whole else [part.strip() for part in settings.dataset.split(",") if part.strip()]
    sources = [source for spec in specs for source in _resolve_one(spec, settings.dataset_dir)]
    shape = None if settings.dataset_format == "auto" else settings.dataset_format
    return [
        replace(
            source,
            shape=shape or source.shape,
            columns=settings.columns or source.columns,
        )
        for source in sources
    ]


def _resolve_one(spec: str, dataset_dir: str | None) -> list[Source]:
    name, limit = _split_limit(spec, dataset_dir)
    path = _find_path(name, dataset_dir)
    if path is None:
        folder = Path(dataset_dir) if dataset_dir else Path(name).parent
        entries = _read_registry(folder)
        if Path(name).name in entries:
            return [_from_registry(Path(name).name, entries, folder, limit)]
        raise UserError(_not_found(name, dataset_dir, entries))
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.name != REGISTRY and p.is_file())
        if not files:
            raise UserError(f"{path}: no file of a known type in this folder. Known: {' '.join(SUFFIXES)}.")
        return [_with_neighbour(Source(file, limit)) for file in files]
    return [_with_neighbour(Source(path, limit))]


def _split_limit(spec: str, dataset_dir: str | None) -> tuple[str, int | None]:
    """`file#N` to (file, N); a file that is really called so keeps its name."""
    name, mark, count = spec.rpartition("#")
    if not mark or _find_path(spec, dataset_dir):
        return spec, None
    if not count.isdecimal() or int(count) == 0:
        raise UserError(f"--dataset {spec}: after # a number of rows is expected, at least 1.")
    return name, int(count)


def _find_path(name: str, dataset_dir: str | None) -> Path | None:
    # os.path: Path.expanduser raises at a user that does not exist.
    folders = [Path(), *([Path(os.path.expanduser(dataset_dir))] if dataset_dir else [])]
    candidates = [folder / os.path.expanduser(name) for folder in folders]
    # os.path.exists: a list of many files is longer than a file name may be, which Path.exists raises at.
    return next((path for path in candidates if os.path.exists(path)), None)


def _read_registry(folder: Path) -> dict[str, Any]:
    path = folder / REGISTRY
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error}). Mend it; it lists the data sets of this folder.") from None
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f"{path}: an object of name -> entry is expected.")
    return entries


def _from_registry(name: str, entries: Mapping[str, Any], folder: Path, limit: int | None) -> Source:
    entry = entries[name]
    if "file_name" not in entry:
        hub = next((f"{key} {entry[key]}" for key in _HUB_KEYS if key in entry), "no file_name")
        raise UserError(
            f"{folder / REGISTRY}: {name} is not a local file ({hub}), and data is not downloaded. "
            "Download it yourself and give the file to --dataset, or add file_name to the entry."
        )
    _check_entry(name, entry, folder)
    path = folder / entry["file_name"]
    if not path.is_file():
        raise UserError(f"{folder / REGISTRY}: {name} names the file {path}, which does not exist.{_near(path)}")
    _check_link(path, folder, name)
    return _source(path, entry, limit or entry.get("num_samples"))


def _check_link(path: Path, folder: Path, name: str) -> None:
    """A registry comes with its data: a link in it must not read another file of this machine.

    Links of a hub's local copy into its own store (snapshots/REVISION/FILE -> blobs/HASH) are fine.
    """
    target, root = path.resolve(), folder.resolve()
    store = root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not (root.parent.name == "snapshots" and target.is_relative_to(store)):
        raise UserError(
            f"{folder / REGISTRY}: {name} names {path.name}, a link to {target} outside the folder of the registry; "
            "give that file to --dataset itself."
        )


def _with_neighbour(source: Source) -> Source:
    """A file given by path takes its columns and tags from the registry beside it, if that lists it."""
    for name, entry in _read_registry(source.path.parent).items():
        if entry.get("file_name") == source.path.name:
            _check_entry(name, entry, source.path.parent)
            return _source(source.path, entry, source.limit)
    return source


def _check_entry(name: str, entry: Mapping[str, Any], folder: Path) -> None:
    """Every key that is used has its type, and the file lies in the registry's folder.

    Raises:
        UserError: Names the registry, the entry, the key and what it should be.
    """

    def require(fits: bool, key: str, what: str) -> None:
        if not fits:
            raise UserError(f"{folder / REGISTRY}: {name} has {key} {entry[key]!r}; {what}.")

    for key in ("columns", "tags"):
        pairs = entry.get(key) or {}
        plain = isinstance(pairs, dict) and all(isinstance(value, str) for value in pairs.values())
        require(plain, key, "an object of texts is expected")
    file, rows = entry["file_name"], entry.get("num_samples")
    require(isinstance(file, str), "file_name", "the name of a file is expected")
    inside = not Path(file).is_absolute() and ".." not in Path(file).parts
    require(inside, "file_name", "it must lie below the folder of the registry; give other files to --dataset")
    whole = rows is None or (isinstance(rows, int) and not isinstance(rows, bool) and rows >= 1)
    require(whole, "num_samples", "a number of at least 1 is expected")
    formatting = entry.get("formatting", "alpaca")
    known = isinstance(formatting, str) and formatting in _FORMATTING
    require(known, "formatting", f"known are {', '.join(_FORMATTING)}")


def _source(path: Path, entry: Mapping[str, Any], limit: int | None) -> Source:
    shape = "preference" if entry.get("ranking") else _FORMATTING[entry.get("formatting", "alpaca")]
    return Source(path, limit, shape, entry.get("columns") or None, _tags(entry.get("tags") or {}))


def _tags(tags: Mapping[str, str]) -> Tags:
    roles = {tags[key]: role for key, role in _ROLE_TAGS.items() if key in tags}
    return Tags(tags.get("role_tag", ""), tags.get("content_tag", ""), roles)


def _not_found(name: str, dataset_dir: str | None, entries: Mapping[str, Any]) -> str:
    path = Path(name)
    where = f" (nor below --dataset_dir {dataset_dir})" if dataset_dir else ""
    near = difflib.get_close_matches(path.name, entries, 3)
    listed = f" {REGISTRY} has {', '.join(near)}." if near else ""
    folder = Path(dataset_dir) / name if dataset_dir and not path.is_absolute() else path
    return f"--dataset {name}: no such file or folder{where}, and no name of a {REGISTRY}.{_near(folder)}{listed}"


def _near(path: Path) -> str:
    """Names in the folder that look like the missing one, or all of them when there are few."""
    if not path.parent.is_dir():
        return f" The folder {path.parent} does not exist either."
    names = sorted(entry.name for entry in path.parent.iterdir() if not entry.name.startswith("."))
    near = difflib.get_close_matches(path.name, names, 3, cutoff=0.5) or (names if len(names) <= 8 else [])
    return f" In {path.parent} there is: {', '.join(near)}." if near else ""
