"""Rows 1 to 3 of the table of faults: a training that is killed, or told to stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "training"), str(TESTS / "commands")]

from training_jobs import job_in, metrics, said, samples, stopping, weights  # noqa: E402, F401

from unsloth_factory.config.settings import RunSettings  # noqa: E402
from unsloth_factory.run.folder import RunFolder  # noqa: E402
from unsloth_factory.training.checkpoints.store import CheckpointStore, claim, damage  # noqa: E402

HARNESS = TESTS / "torture" / "kill_harness.py"
CI_KILLS = {"sft": 8, "dpo": 4, "qlora": 4, "extend": 4}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness saw; one process for all rows, because importing the libraries takes longest."""
    words = [str(tmp_path_factory.mktemp("kills")), "7", "signals=1", *(f"{k}={n}" for k, n in CI_KILLS.items())]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(HARNESS), *words], capture_output=True, text=True, env=environment,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CI_KILLS)
def test_fault_01_kill_at_a_random_instant(killed: dict[str, Any], case: str) -> None:
    """kill -9 of SFT, DPO, QLoRA and extended runs: each resume succeeds and ends with the same bits."""
    found = killed[case]
    assert found["kills"] == CI_KILLS[case]
    assert found["wrong"] == []
    assert found["most_steps_lost"] <= 1  # a save at every step


def save_and_die(folder: Path, write: Callable[[Path], None], calls: int) -> int:
    """Save checkpoint 20 in a child that kills itself at its n-th change of the disk; its exit code, or -9."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    left = [calls]

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **named)

        return call

    code = 70
    try:
        for name in ("mkdir", "replace", "rename", "fsync", "chmod", "unlink", "rmdir", "open"):
            setattr(os, name, counted(getattr(os, name)))
        for name in ("write_bytes", "write_text"):
            setattr(Path, name, counted(getattr(Path, name)))
        settings = RunSettings(resume="auto", save_total_limit=1)
        CheckpointStore(folder, settings, lambda _: None).save(20, write, {"step": 20}, 1)
        code = 0
    finally:
        os._exit(code)


def test_fault_02_kill_inside_the_save(tmp_path: Path) -> None:
    """Killed at every single change of the disk within a save: the old checkpoint or the new one is there, whole."""

    def write(folder: Path) -> None:
        (folder / "adapter").mkdir()
        (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)))
        (folder / "optimizer.safetensors").write_bytes(b"0123456789")

    run, newest = RunFolder(tmp_path / "run"), []
    with claim(run, RunSettings(resume="auto")) as store:
        store.save(10, write, {"step": 10}, 1)
    calls = 0
    while True:
        copy = tmp_path / f"run-{calls}"
        shutil.copytree(run.path, copy)
        status = save_and_die(copy, write, calls)
        with claim(RunFolder(copy), RunSettings(resume="auto"), lambda _: None) as store:
            found = store.to_resume()
            assert found is not None
            newest.append(found.step)
            assert damage(found.path) is None
            assert [path.name for path in copy.iterdir() if path.name.startswith((".tmp", ".del"))] == []
            store.save(30, write, {"step": 30}, 1)  # and the run can go on
        if status == 0:
            break
        assert status == -signal.SIGKILL
        calls += 1
    assert calls > 10
    assert newest == sorted(newest)  # the old one up to the rename, then the new one
    assert (newest[0], newest[-1]) == (10, 20)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_fault_03_signals(killed: dict[str, Any], name: str, code: int) -> None:
    """SIGTERM and Ctrl-C: the step is finished, saved, and the exit code says that it can be resumed."""
    found = killed[name]
    assert found["status"] == code
    assert f"{name}: finishing this step and saving" in found["text"]
    assert "Stopped at step 2 of 12; everything is saved" in found["text"]
    assert found["saved"] == ["checkpoint-1", "checkpoint-2"]
    assert not found["final"]


def test_fault_03_signals_twice_and_late(killed: dict[str, Any]) -> None:
    """A second Ctrl-C leaves at once without saving; a SIGTERM when all is written changes nothing."""
    assert killed["twice"]["status"] == 130
    assert "uf: interrupted" in killed["twice"]["text"]
    assert killed["twice"]["saved"] == ["checkpoint-1"]
    assert killed["late"]["status"] == 0
