"""The size targets: short functions, readable files, few parameters, no grab-bag modules, no pickle."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "unsloth_factory").rglob("*.py")) + sorted((ROOT / "scripts").rglob("*.py"))
MAX_FILE, MAX_FUNCTION, MAX_KERNEL, MAX_PARAMETERS = 400, 80, 120, 8


def functions(path: Path) -> list[tuple[str, int, int]]:
    """(name, lines, parameters) of each function of a file; a docstring counts as lines, `self` is no parameter."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = sum(a.arg not in ("self", "cls") for a in arguments)
            if any(isinstance(one, ast.Name) and one.id == "jit" for one in node.decorator_list):
                count = 0  # a Triton kernel takes its pointers and strides one by one
            found.append((node.name, (node.end_lineno or 0) - node.lineno + 1, count))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    limit = MAX_KERNEL if "kernels" in path.parts else MAX_FUNCTION
    for name, lines, parameters in functions(path):
        assert lines <= limit, f"{name}: {lines} lines"
        assert parameters <= MAX_PARAMETERS, f"{name}: {parameters} parameters"
    assert path.stem not in ("utils", "helpers", "misc", "common")


def test_medians() -> None:
    lengths = sorted(lines for path in FILES for _, lines, _ in functions(path))
    assert statistics.median(lengths) <= 14
    assert lengths[int(0.9 * len(lengths))] <= 45


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_forbidden(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Global), f"global at line {node.lineno}"
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), f"bare except at line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name.split(".")[0] for a in node.names} | {(getattr(node, "module", "") or "").split(".")[0]}
            assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, f"line {node.lineno}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("torch.load", "eval", "exec", "os.system"), f"{name} at line {node.lineno}"
            for keyword in node.keywords:
                on = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("trust_remote_code", "shell") and on), f"line {node.lineno}"


def test_no_machine_paths_or_registry_hosts() -> None:
    pattern = re.compile(r"(?<![\w.])/(work|root|opt)/|pypi" r"\.org|files\.python" r"hosted")
    for path in ROOT.rglob("*"):
        skipped = {".git", ".venv", ".carry", "output", "__pycache__", "build"} & set(path.relative_to(ROOT).parts)
        if path.suffix in (".py", ".md", ".toml", ".yaml", ".txt", ".json") and not skipped and path.is_file():
            assert not pattern.search(path.read_text(encoding="utf-8", errors="replace")), path
