"""Command line and YAML -> one checked settings object. Flag wins over YAML, YAML over the default."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from unsloth_factory.config.aliases import ALIASES, NO_EFFECT, STAGES, TRAINING_ALIASES, VALUE_ALIASES
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.fields import Setting, settings_of
from unsloth_factory.config.values import BadValue, Names, convert, shortened, without_none
from unsloth_factory.config.yaml_file import read_yaml

ConfigT = TypeVar("ConfigT")
YAML_ENDINGS = (".yaml", ".yml")
NO_VALUE = object()
MOST_MISTAKES = 50  # shown at once
KEY_VALUE = re.compile(r"([A-Za-z][\w-]*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Parsed:
    """The settings object, and notes about accepted keys that change nothing."""

    config: Any
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Given:
    """One setting as it was written: canonical name, raw value, and where ("--epochs", "job.yaml: epochs")."""

    name: str
    value: Any
    where: str


def parse(config_type: type[Any], argv: list[str], command: str = "") -> Parsed:
    """Parse `[file.yaml] [--flag value | --flag=value | key=value] ...`.

    Args:
        config_type: The command's settings type (config/commands.py).
        argv: Arguments after the command.
        command: The command's name; a LLaMA-Factory file's `stage:` must agree with it.

    Raises:
        UsageError: All mistakes at once, each with its flag, value and what would be right.
    """
    table = settings_of(config_type)
    problems: list[str] = []
    notes: list[str] = []
    given: dict[str, _Given] = {}
    files, flags = _split(argv, table, problems)
    if "plan" in table and files:
        flags.insert(0, ("plan", files.pop(0), "plan file"))
    for path in files:
        settings = read_yaml(Path(path))
        for key, value in settings.items():
            _take(str(key), value, f"{path}:{settings.lines[key]}: {key}", (table, command, given, problems, notes))
    for key, value, where in flags:
        _take(key, value, where, (table, command, given, problems, notes))
    values = _converted(given.values(), table, problems)
    _refuse(problems)
    try:
        return Parsed(build(config_type, values), notes)
    except UsageError as error:
        raise UsageError("\n".join(_located(line, given) for line in str(error).splitlines())) from None


def from_mapping(config_type: type[Any], mapping: dict[str, Any], where: str, command: str = "") -> Parsed:
    """Settings from a mapping such as a stage of a plan; `where` opens each message.

    Raises:
        UsageError: All mistakes at once.
    """
    table = settings_of(config_type)
    problems: list[str] = []
    notes: list[str] = []
    given: dict[str, _Given] = {}
    lines = getattr(mapping, "lines", {})
    for key, value in mapping.items():
        place = f" (line {lines[key]})" if key in lines else ""
        _take(str(key), value, f"{where}: {key}{place}", (table, command, given, problems, notes))
    values = _converted(given.values(), table, problems)
    _refuse(problems)
    try:
        return Parsed(build(config_type, values), notes)
    except UsageError as error:
        raise UsageError("\n".join(f"{where}: {line}" for line in str(error).splitlines())) from error


def configure(config_type: type[ConfigT], **values: Any) -> ConfigT:
    """Settings from keyword arguments, by the names of the flags: `configure(SftConfig, model="tiny", epochs=1)`.

    Raises:
        UsageError: All mistakes at once.
    """
    return from_mapping(config_type, values, "argument").config


def build(config_type: type[ConfigT], values: dict[str, Any]) -> ConfigT:
    """Make a settings object from flat, converted values; the groups check themselves.

    Raises:
        UsageError: The rules that groups broke, all of them.
    """
    table = settings_of(config_type)
    default = config_type()
    problems: list[str] = []
    changes: dict[str, Any] = {}
    for part in fields(default):  # type: ignore[arg-type]
        current = getattr(default, part.name)
        if is_dataclass(current) and not isinstance(current, type):
            inner = {n: v for n, v in values.items() if table[n].path[0] == part.name}
            try:
                changes[part.name] = replace(current, **inner)
            except UsageError as error:
                problems.append(str(error))
        elif part.name in values:
            changes[part.name] = values[part.name]
    if problems:
        raise UsageError("\n".join(problems))
    return replace(default, **changes)  # type: ignore[type-var]


def flat_values(config: Any) -> dict[str, Any]:
    """The opposite of `build`: every flag with its value."""
    values = {}
    for setting in settings_of(type(config)).values():
        value = config
        for name in setting.path:
            value = getattr(value, name)
        values[setting.name] = value
    return values


def _refuse(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - MOST_MISTAKES} more mistakes"] if len(problems) > MOST_MISTAKES else []
        raise UsageError("\n".join(problems[:MOST_MISTAKES] + more))


def suggestion(word: str, known: Iterable[str]) -> str:
    """' Did you mean X?' for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def _split(
    argv: list[str], table: dict[str, Setting], problems: list[str]
) -> tuple[list[str], list[tuple[str, Any, str]]]:
    """Sort the arguments into settings files and (key, value, where) triples."""
    files: list[str] = []
    flags: list[tuple[str, Any, str]] = []
    words = list(argv)
    problems += [
        f"{word.encode('utf-8', 'backslashreplace').decode()}: not UTF-8 text; rename the file or folder"
        for word in words
        if any("\ud800" <= character <= "\udfff" for character in word)
    ]
    while words:
        word = words.pop(0)
        pair = KEY_VALUE.fullmatch(word)
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals:
                value = _next_value(key, words, table)
            if value is NO_VALUE:
                problems.append(f"--{key}: needs a value")
            else:
                flags.append((key, value, f"--{key}"))
        elif word.lower().endswith(YAML_ENDINGS) and not flags:
            files.append(word)
        elif pair:
            flags.append((pair[1], pair[2], pair[1]))
        else:
            problems.append(f"{word}: not a flag (--name value), a key=value pair or a leading .yaml file")
    return files, flags


def _next_value(key: str, words: list[str], table: dict[str, Setting]) -> Any:
    """The value after a flag. A truth flag may stand alone; a negative number is a value, not a flag."""
    setting = table.get(canonical(key, table))
    is_truth = setting is not None and without_none(setting.annotation)[0] is bool
    if not words or words[0].startswith("--"):
        return True if is_truth or setting is None else NO_VALUE
    if setting is not None and without_none(setting.annotation)[0] is Names:
        taken = [words.pop(0)]
        while words and not words[0].startswith("--") and not KEY_VALUE.fullmatch(words[0]):
            taken.append(words.pop(0))
        return ",".join(taken)
    if is_truth and words[0].lower() not in ("true", "false", "yes", "no", "on", "off", "0", "1"):
        return True
    return words.pop(0)


def canonical(key: str, table: dict[str, Setting]) -> str:
    """`--max-seq-length`, `cutoff_len` -> `max_seq_length`."""
    name = key.replace("-", "_")
    if name in table:
        return name
    if name in TRAINING_ALIASES and TRAINING_ALIASES[name] in table:
        return TRAINING_ALIASES[name]
    alias = ALIASES.get(name, name)
    return alias if alias in table else name


def _take(key: str, value: Any, where: str, context: tuple) -> None:
    """Put one key into `given`, or say why it cannot be."""
    table, command, given, problems, notes = context
    name = canonical(key, table)
    if name in table:
        words = VALUE_ALIASES.get(name, {})
        given[name] = _Given(name, words.get(value, value) if isinstance(value, str) else value, where)
    elif name == "stage" and command:
        if STAGES.get(str(value)) != command:
            problems.append(f"{where}: {value} is not what `{command}` does.{_stage_hint(str(value))}")
    elif name in NO_EFFECT:
        notes.append(f"{where}: no effect, {NO_EFFECT[name]}")
    else:
        problems.append(f"{where}: unknown setting.{suggestion(name, list(table) + list(ALIASES))}")


def _stage_hint(stage: str) -> str:
    return f" Use `uf {STAGES[stage]}`." if stage in STAGES else f" Known stages: {', '.join(STAGES)}."


def _converted(given: Iterable[_Given], table: dict[str, Setting], problems: list[str]) -> dict[str, Any]:
    values = {}
    for item in given:
        try:
            values[item.name] = convert(_as_text(item), table[item.name].annotation)
        except BadValue as error:
            problems.append(f"{item.where} {shortened(str(item.value))}: {error}")
    return values


def _as_text(item: _Given) -> Any:
    """LLaMA-Factory writes `resume_from_checkpoint: true|null`; ours is a text."""
    if item.name == "resume" and str(item.value).lower() in ("true", "false"):
        return "auto" if str(item.value).lower() == "true" else None
    return item.value


def _located(problem: str, given: dict[str, _Given]) -> str:
    """A group's message opens with the flag; where a settings file gave the value, its line is put before it."""
    item = given.get(problem.partition(" ")[0].removeprefix("--"))
    return f"{item.where}: {problem}" if item and not item.where.startswith("--") else problem
