"""Real signals to real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RUNNER = Path(__file__).resolve().parent / "kill_runner.py"
ROOT = RUNNER.parent.parent.parent


@pytest.fixture(scope="module")
def found(random_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the runner saw: one process for all, because importing the libraries takes longest."""
    folder = tmp_path_factory.mktemp("kills")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUNNER), str(random_model_dir), str(folder), "6"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "RESULT " in done.stdout, done.stderr[-3000:]
    return json.loads(done.stdout.rsplit("RESULT ", 1)[1])


def test_killed_at_random_instants(found: dict[str, Any]) -> None:
    result = found["kills"]
    assert result["status"] == 0
    assert result["kills"] == 6
    assert result["killed"] == result["straight"]
    assert result["killed_steps"] == result["straight_steps"] == 15
    assert result["leftovers"] == []


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_and_sets_the_exit_code(found: dict[str, Any], name: str, code: int) -> None:
    result = found[name]
    assert result["status"] == code
    assert f"{name}: finishing this step and saving" in result["text"]
    assert "Stopped: Stopped at step 2 of 15" in result["text"]
    assert "--resume auto" in result["text"]
    assert result["saved"] == ["checkpoint-1", "checkpoint-2"]
    assert not result["final"]


def test_a_second_ctrl_c_leaves_at_once(found: dict[str, Any]) -> None:
    assert found["twice"]["status"] == 99
    assert found["twice"]["saved"] == ["checkpoint-1"]
