"""One writer a folder, leftovers of writers that died, checksums that hold while a file is replaced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.run import atomic

ROOT = Path(__file__).resolve().parents[2]


def test_second_writer_is_refused_until_the_first_ends_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "WAIT_SECONDS", 0.2)
    program = (
        "import os, pathlib, sys\nfrom unsloth_factory.run.atomic import exclusive\n"
        "with exclusive(pathlib.Path(sys.argv[1]), 'uf gguf'):\n    print('in', flush=True)\n    sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "new")]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    assert first.stdout.readline() == "in\n"
    with (
        pytest.raises(
            UserError, match=r"Another program is writing into .*new. Wait for it, then start uf merge again"
        ),
        atomic.exclusive(tmp_path / "new", "uf merge"),
    ):
        pass
    first.kill()
    first.wait()
    with atomic.exclusive(tmp_path / "new", "uf merge"):
        assert os.listdir(tmp_path / "new") == []


def test_a_child_that_outlives_its_parent_holds_the_folder(tmp_path: Path) -> None:
    with atomic.exclusive(tmp_path, "x") as lock:
        child = subprocess.Popen(["sleep", "0.5"], pass_fds=(lock,))
    with atomic.exclusive(tmp_path, "y"):
        assert child.poll() is not None  # it waited


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(UserError, match="cannot be used .* Name a folder that can be written"),
        atomic.exclusive(tmp_path / "file" / "sub", "x"),
    ):
        pass


def test_leftovers_of_the_dead_go_those_of_the_living_stay(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, living = int(done.stdout), os.getppid()
    names = {
        f".x.gguf.{dead}.partial": False,
        f".x.gguf.{dead}.ab_12.partial": False,
        f".x.gguf.{living}.partial": True,
        f".x.gguf.{living}.ab12.partial": True,
        ".x.gguf.partial": False,
        ".x.gguf.old.partial": False,
        ".x.gguf2.partial": True,
        ".x.partial": True,
        "x.gguf": True,
    }
    for name in names:
        (tmp_path / name).write_text(name)
    atomic.remove_leftovers(tmp_path / "x.gguf")
    assert {name: (tmp_path / name).exists() for name in names} == names


def test_long_names_have_temporary_ones_too(tmp_path: Path) -> None:
    path = tmp_path / ("文" * 84 + ".x")  # 254 bytes
    atomic.write_text(path, "a")
    atomic.write_text(path, "b")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert len(os.fsencode(atomic.own_partial(path).name)) < 100
