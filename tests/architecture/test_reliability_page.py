"""docs/reliability.md says what its tests say, and has every row."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reliability_table.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("reliability_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert script.page() == script.PAGE.read_text(encoding="utf-8"), "run python scripts/reliability_table.py"


def test_a_row_without_a_test_is_noticed(script, monkeypatch):
    monkeypatch.setitem(script.FAULTS, "46", "something new")
    with pytest.raises(SystemExit, match="fault 46"):
        script.page()


def test_a_test_without_a_row_is_noticed(script, monkeypatch):
    monkeypatch.delitem(script.FAULTS, "44")
    with pytest.raises(SystemExit, match="tests without a row: test_fault_44"):
        script.page()
