"""Read a settings file: safe YAML whose values mean what they look like, with the line of every key.

YAML 1.1 has surprises that change values in silence: the last of two equal keys wins, 012 is 10, 1:30 is 90, 1.10 is
1.1 as a name, 2024-01-01 is a date. Here doubled keys and octal numbers are refused, the rest keeps its written text.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import yaml

from unsloth_factory.config.errors import UsageError

# PyYAML needs three seconds for the worst 256 KiB; the longest settings file seen has 6 KiB.
MAX_BYTES = 1 << 18
# Values after all aliases are written out: ten lines of aliases can stand for a billion values.
MAX_VALUES = 100_000
_PREFIX = "tag:yaml.org,2002:"
_OCTAL = re.compile(r"([-+]?)0([0-7_]+)")


class LinedDict(dict[Any, Any]):
    """A mapping of the file; `lines` has the line of each key, counted from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Any, int] = {}


class _WrittenInt(int):
    """An integer whose text is the one in the file: `name: 0x10` is a name of four characters."""

    written: str

    def __str__(self) -> str:
        return self.written


class _WrittenFloat(float):
    """A float whose text is the one in the file: `name: 1.10` is not the name 1.1."""

    written: str

    def __str__(self) -> str:
        return self.written


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader without the surprises above; every error names its line."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_PREFIX}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if isinstance(key, Hashable) and key in seen:
                raise _problem(f"key {str(key)!r} stands twice (lines {seen[key]} and {line})", key_node)
            if isinstance(key, Hashable):
                seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_lined(self, node: yaml.MappingNode) -> Iterator[LinedDict]:
        """A mapping that knows its lines; in two steps, as PyYAML wants it for aliases."""
        data = LinedDict()
        yield data
        data.update(self.construct_mapping(node))
        data.lines = {self.construct_object(key): key.start_mark.line + 1 for key, _ in node.value}

    def construct_number(self, node: yaml.ScalarNode) -> int | float | str:
        """An int or float; 1:30 and the like stay text, 012 is refused."""
        text = self.construct_scalar(node)
        if ":" in text:
            return text
        octal = _OCTAL.fullmatch(text)
        if octal and int(octal[2], 8) != int(octal[2]):
            raise _problem(
                f"{text} is {int(octal[1] + octal[2], 8)} in YAML 1.1 and {int(octal[1] + octal[2])} in YAML 1.2; "
                "write the number without the leading 0, or a name in quotes",
                node,
            )
        number: _WrittenInt | _WrittenFloat
        if node.tag == f"{_PREFIX}int":
            number = _WrittenInt(self.construct_yaml_int(node))
        else:
            number = _WrittenFloat(self.construct_yaml_float(node))
        number.written = text
        return number

    def construct_text(self, node: yaml.ScalarNode) -> str:
        """A text; escapes can write characters that no file and no terminal takes."""
        text = self.construct_scalar(node)
        if "\0" in text:
            raise _problem("a NUL character in the text", node)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise _problem("half of a surrogate pair in the text", node)
        return text


_StrictLoader.add_constructor(f"{_PREFIX}map", _StrictLoader.construct_lined)
_StrictLoader.add_constructor(f"{_PREFIX}int", _StrictLoader.construct_number)
_StrictLoader.add_constructor(f"{_PREFIX}float", _StrictLoader.construct_number)
_StrictLoader.add_constructor(f"{_PREFIX}str", _StrictLoader.construct_text)


def read_yaml(path: Path) -> LinedDict:
    """Read a mapping from a YAML file.

    Raises:
        UsageError: Missing, too large (256 KiB), not YAML, or not a mapping; with the line where it breaks.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such settings file")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path}: {path.stat().st_size} bytes; a settings file has at most {MAX_BYTES}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8"
        ) from None
    try:
        values = _load(text)
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply for a settings file") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{_place(path, text, error)}: {_reason(error)}") from None
    if not isinstance(values, LinedDict):
        raise UsageError(f"{path}: expected `setting: value` lines, got {type(values).__name__}")
    return values


def _load(text: str) -> Any:
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded_size(node, {}, set())
        return _construct(loader, node)
    finally:
        loader.dispose()


def _construct(loader: _StrictLoader, node: yaml.Node) -> Any:
    """The document's values; what PyYAML's constructors let through as other exceptions gets a place.

    `0x_`, `._`, `!!int x`, `!!timestamp x` and integers of 5,000 digits raise ValueError or AttributeError there.
    """
    current = [node]
    construct_object = loader.construct_object

    def noting(inner: yaml.Node, deep: bool = False) -> Any:
        current[0] = inner
        return construct_object(inner, deep)

    loader.construct_object = noting  # type: ignore[method-assign, assignment]
    try:
        return loader.construct_document(node)
    except (ValueError, AttributeError, TypeError, OverflowError) as error:
        raise _problem(f"a value that cannot be read ({error})", current[0]) from None


def _expanded_size(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """Values below a node with every alias written out.

    Raises:
        MarkedYAMLError: More than MAX_VALUES, or an alias inside what it stands for.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    if id(node) in above:
        raise _problem("an alias inside the value that it stands for", node)
    above.add(id(node))
    size = 1
    if isinstance(node, yaml.CollectionNode):
        pairs = [child for item in node.value for child in (item if isinstance(item, tuple) else (item,))]
        size += sum(_expanded_size(child, sizes, above) for child in pairs)
    if size > MAX_VALUES:
        raise _problem(f"more than {MAX_VALUES:,} values with its aliases written out", node)
    above.discard(id(node))
    sizes[id(node)] = size
    return size


def _problem(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _place(path: Path, text: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return f"{path}:{mark.line + 1}"
    position = getattr(error, "position", None)
    return str(path) if position is None else f"{path}:{text.count(chr(10), 0, position) + 1}"


def _reason(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        return f"the character U+{error.character:04X} is not allowed in YAML"
    return str(getattr(error, "problem", None) or error)
