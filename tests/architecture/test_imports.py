"""The arrows between folders are those of the table, lazy imports included, and every module imports by itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "unsloth_factory"
ALLOWED = {
    "cli": {"config"},
    "config": set(),
    "run": {"config"},
    "knowledge": set(),
    "scoring": {"knowledge"},
    "data": {"config", "knowledge", "run"},
    "kernels": set(),
    "model": {"config", "kernels", "run"},
    "inference": {"config", "data", "model"},
    "estimate": {"config", "model"},
    "training": {"config", "data", "model", "kernels", "scoring", "run"},
    "evaluation": {"config", "data", "model", "inference", "scoring", "knowledge", "run"},
    "export": {"config", "data", "model", "inference", "run"},
    "commands": {
        "config", "run", "knowledge", "scoring", "data", "model", "inference", "estimate", "training", "evaluation",
        "export",
    },
}  # fmt: skip
LIGHT = ("cli", "config", "run", "knowledge", "scoring")
HEAVY = ("torch", "transformers", "pyarrow", "matplotlib", "pandas")
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder that a module belongs to: `unsloth_factory/data/x.py` -> data; `cli.py` -> cli."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports anywhere, or names in a "module:function" string."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "unsloth_factory" and len(parts) > 1 and (PACKAGE / parts[1]).exists():
                rooms.add(parts[1])
    return rooms


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_arrows(path: Path) -> None:
    if path.parent == PACKAGE and path.name == "__init__.py":
        return
    extra = imported_rooms(path) - ALLOWED[room(path)] - {room(path)}
    assert not extra, f"{path.name} may not import {', '.join(sorted(extra))}"


def test_every_folder_is_in_the_table() -> None:
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(ALLOWED), f"new folder outside the table: {rooms - set(ALLOWED)}"


def test_every_module_imports() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in MODULES
    ]
    program = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", "importing prints"


def test_light_rooms_stay_light() -> None:
    names = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if room(path) in LIGHT
    ]
    program = (
        "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_lazy_commands_exist() -> None:
    from importlib import import_module

    from unsloth_factory.config.table import COMMANDS

    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        assert callable(getattr(import_module(f"unsloth_factory.{module}"), function)), name
