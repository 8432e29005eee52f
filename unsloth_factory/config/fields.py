"""The flat table of a command's settings: flag -> where it lives, its type, default and help."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_type_hints


@dataclass(frozen=True)
class Setting:
    """One flag. `path` leads to it from the command's settings: ("loop", "epochs"), or ("beta",)."""

    name: str
    path: tuple[str, ...]
    annotation: Any
    default: Any
    help: str
    group: str


def settings_of(config_type: type) -> dict[str, Setting]:
    """All flags of a command's settings type, groups flattened, in the order in which they are declared."""
    table: dict[str, Setting] = {}
    hints = get_type_hints(config_type)
    texts = field_help(config_type)
    defaults = config_type()
    for field in fields(config_type):
        value = getattr(defaults, field.name)
        if is_dataclass(value):
            for inner in settings_of(type(value)).values():
                default = getattr(value, inner.name)
                setting = Setting(
                    inner.name, (field.name, *inner.path), inner.annotation, default, inner.help, inner.group
                )
                table[inner.name] = setting
        else:
            group = (config_type.__doc__ or "").strip().splitlines()[0]
            table[field.name] = Setting(
                field.name, (field.name,), hints[field.name], value, texts.get(field.name, ""), group
            )
    return table


@cache  # parsing the source costs 100 ms a command line, and the texts do not change
def field_help(config_type: type) -> dict[str, str]:
    """The text under each field of a dataclass and its bases; a base's text holds until a subclass writes another."""
    texts: dict[str, str] = {}
    for cls in reversed(config_type.__mro__):
        if not is_dataclass(cls):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                texts[statement.target.id] = " ".join(str(after.value.value).split())
    return texts
