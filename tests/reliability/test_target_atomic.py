"""Target: fail the Nth write, flush or rename, N = 1, 2, ... until success: the old state or the new, never neither.

As databases are tested: the same operation again and again, each time another of its calls to the system fails (or the
process dies there), and what is on the disk is looked at after each.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import RunSettings
from unsloth_factory.export import merge as merge_module
from unsloth_factory.export.merge import MergeOptions, merge
from unsloth_factory.run import atomic
from unsloth_factory.training.checkpoints.store import CheckpointStore, damage

CALLS: tuple[tuple[Any, str], ...] = (
    (os, "fsync"), (os, "replace"), (os, "chmod"), (os, "mkdir"), (tempfile, "mkstemp"), (shutil, "copyfile"),
    (atomic, "_exchange"), (Path, "write_text"), (Path, "write_bytes"),
)  # fmt: skip


class Writes:
    """A file open for writing; each `write` is one call that may fail, half way through its data."""

    def __init__(self, file: Any, call: Callable[[str], None]) -> None:
        self._file, self._call = file, call

    def write(self, data: Any) -> int:
        try:
            self._call("write")
        except BaseException:
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()
            raise
        return self._file.write(data)

    def __enter__(self) -> Writes:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def failing(number: int, fail: Callable[[], None]) -> Iterator[list[str]]:
    """The `number`th of the calls above does `fail` instead; gives the names of the calls made."""
    made: list[str] = []

    def call(name: str) -> None:
        made.append(name)
        if len(made) == number:
            fail()

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            original = getattr(owner, name)

            def counted(*args: Any, _original: Any = original, _name: str = name, **options: Any) -> Any:
                call(_name)
                return _original(*args, **options)

            patch.setattr(owner, name, counted)
        plain = open

        def opened(path: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = plain(path, mode, *args, **options)
            return Writes(file, call) if mode == "wb" else file

        patch.setattr("builtins.open", opened)
        yield made


def full() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def until_success(operation: Callable[[], object], check: Callable[[bool], None], reset: Callable[[], None]) -> int:
    """Fail the 1st, 2nd, ... call of an operation; returns how many calls it has."""
    number = 0
    while True:
        number += 1
        reset()
        with failing(number, full) as made:
            try:
                operation()
                done = True
            except (OSError, UserError):
                done = False
        check(done)
        if len(made) < number:
            assert done
            return number - 1


def until_it_lives(operation: Callable[[], object], check: Callable[[bool], None], reset: Callable[[], None]) -> int:
    """The same, but the process dies at the call: nothing is cleaned up. (The child runs no tensor operation.)"""
    number = 0
    while True:
        number += 1
        reset()
        pid = os.fork()
        if pid == 0:
            try:
                with failing(number, lambda: os._exit(3)):
                    operation()
            finally:
                os._exit(0)
        alive = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        check(alive)
        if alive:
            return number - 1


@pytest.mark.parametrize("driver", [until_success, until_it_lives])
def test_target_atomic_file(tmp_path, driver):
    """`write_json`: the file holds the old value or the new one; an error leaves nothing beside it."""
    path = tmp_path / "state.json"

    def reset() -> None:
        for left in tmp_path.iterdir():
            left.unlink()
        atomic.write_json(path, {"old": 1})

    def check(done: bool) -> None:
        text = path.read_text()
        assert text in ('{\n  "old": 1\n}\n', '{\n  "new": 2\n}\n')
        assert not done or "new" in text
        if driver is until_success:
            assert os.listdir(tmp_path) == ["state.json"]
        atomic.write_json(path, {"later": 3})
        assert os.listdir(tmp_path) == ["state.json"]  # the next write clears up

    assert driver(lambda: atomic.write_json(path, {"new": 2}), check, reset) >= 6


@pytest.mark.parametrize("in_one_step", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("driver", [until_success, until_it_lives])
def test_target_atomic_folder(tmp_path, monkeypatch, driver, in_one_step):
    """`publish_folder`: the old folder or the new one, also where the kernel cannot swap two names."""
    if not in_one_step:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    final, temporary = tmp_path / "model", atomic.own_partial(tmp_path / "model")

    def fill(folder: Path, text: str) -> None:
        folder.mkdir()
        for name in ("weights", "config", "SHA256SUMS"):
            (folder / name).write_text(text)

    def reset() -> None:
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        fill(final, "old")
        fill(temporary, "new")

    def check(done: bool) -> None:
        if driver is until_it_lives and not in_one_step:
            atomic.remove_leftovers(final)  # a crash between the two renames is mended by the next writer
        texts = {path.read_text() for path in final.iterdir()}
        assert (len(texts), len(list(final.iterdir()))) == (1, 3)
        assert texts <= {"old", "new"}
        assert not done or texts == {"new"}
        atomic.remove_leftovers(final)
        assert os.listdir(tmp_path) == ["model"]
        assert {path.read_text() for path in final.iterdir()} == texts

    assert driver(lambda: atomic.publish_folder(temporary, final), check, reset) >= 8


@pytest.mark.parametrize("driver", [until_success, until_it_lives])
def test_target_atomic_checkpoint(tmp_path, driver):
    """Saving a checkpoint: the one before stays whole, the new one is whole or not there, and one can always resume."""
    store = CheckpointStore(tmp_path, RunSettings(save_total_limit=2, resume="auto"), lambda _: None)

    def write(folder: Path) -> None:
        with open(folder / "weights.safetensors", "wb") as file:
            file.write(bytes(range(256)) * 16)

    def save(step: int) -> None:
        store.save(step, write, {"step": step}, 5000)

    def reset() -> None:
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
        for step in (1, 2):
            save(step)

    def check(done: bool) -> None:
        store.remove_leftovers()
        found = store.steps()
        assert found in ([1, 2], [1, 2, 3], [2, 3])
        assert [damage(store.path(step)) for step in found] == [None] * len(found)
        newest = store.to_resume()
        assert newest is not None
        assert newest.state == {"step": newest.step}
        assert not done or found == [2, 3]
        assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in found}

    assert driver(lambda: save(3), check, reset) >= 8


def test_target_atomic_merge(random_model_dir, tmp_path, monkeypatch):
    """A merge over an older model: whole and agreeing with its SHA256SUMS after every failure."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model_dir)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "a")
    # Reading the result back is most of the time of a merge and writes nothing.
    monkeypatch.setattr(merge_module, "_compare", lambda *args: args[-1].update(kl_max=0.0))
    home = tmp_path / "out"
    target = home / "m"

    def reset() -> None:
        shutil.rmtree(home, ignore_errors=True)
        target.mkdir(parents=True)
        (target / "model.safetensors").write_bytes(b"old")
        atomic.write_sums(target, ["model.safetensors"])

    def check(done: bool) -> None:
        assert atomic.verify_sums(target) == []
        names = {path.name for path in target.iterdir()}
        is_new = {"config.json", "tokenizer.json", "README.md", "merge.json", "SHA256SUMS"} <= names
        assert is_new or names == {"model.safetensors", "SHA256SUMS"}
        assert is_new or not done
        assert os.listdir(home) == ["m"]

    options = MergeOptions(overwrite=True)
    assert until_success(lambda: merge(random_model_dir, tmp_path / "a", target, options), check, reset) >= 40
