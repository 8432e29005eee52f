"""Read a settings file: safe YAML, no doubled keys, a size limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from unsloth_factory.config.errors import UsageError

MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; YAML itself would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, str) and key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"key {key!r} stands twice (lines {seen[key]} and {line})", problem_mark=key_node.start_mark
                )
            if isinstance(key, str):
                seen[key] = line
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file.

    Raises:
        UsageError: Missing, too large (1 MiB), not YAML, or not a mapping; with the line where it breaks.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such settings file")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes; a settings file has at most {MAX_BYTES}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UsageError(f"{where}: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: expected `setting: value` lines, got {type(values).__name__}")
    return values
