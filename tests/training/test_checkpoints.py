"""The checkpoint store: damage of every kind is seen, a save is whole or absent, a folder belongs to one run."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import RunSettings
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training.checkpoints import store as store_module
from unsloth_factory.training.checkpoints.store import CheckpointStore, claim, damage


def fill(folder: Path) -> None:
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)))
    (folder / "rng.safetensors").write_bytes(b"0123456789")


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, lines: list[str]) -> Iterator[CheckpointStore]:
    with claim(RunFolder(tmp_path / "run"), RunSettings(resume="auto", save_total_limit=3), lines.append) as held:
        for step in (10, 20, 30):
            held.save(step, fill, {"step": step}, 1)
        yield held


def every_file(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_newest_is_taken(store: CheckpointStore) -> None:
    found = store.to_resume()
    assert found is not None
    assert (found.step, found.state) == (30, {"step": 30})
    assert {path.stat().st_mode & 0o777 for path in every_file(found.path)} == {0o644}


def test_missing_files_are_named_and_the_checkpoint_skipped(store: CheckpointStore, lines: list[str]) -> None:
    for path in every_file(store.path(30)):
        original = path.read_bytes()
        path.unlink()
        lines.clear()
        found = store.to_resume()
        assert found is not None
        assert found.step == 20
        assert len(lines) == 1
        assert "checkpoint-30 is damaged and is skipped" in lines[0]
        assert path.name in lines[0]
        path.write_bytes(original)


def test_a_named_checkpoint(store: CheckpointStore, lines: list[str]) -> None:
    def resume(path: str) -> store_module.Checkpoint | None:
        return CheckpointStore(store.folder, RunSettings(resume=path), lines.append).to_resume()

    assert resume(str(store.path(20))).step == 20  # type: ignore[union-attr]
    assert resume("checkpoint-10").step == 10  # type: ignore[union-attr]
    with pytest.raises(UserError, match=r"--resume elsewhere: no checkpoint folder.*\[10, 20, 30\]"):
        resume("elsewhere")
    (store.path(20) / "rng.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged: rng.safetensors differs"):
        resume(str(store.path(20)))


def test_only_the_newest_are_kept(store: CheckpointStore) -> None:
    store.save(40, fill, {}, 1)
    assert store.steps() == [20, 30, 40]


def test_leftovers_are_removed(store: CheckpointStore) -> None:
    for name in (".tmp-40-123", ".del-10-5", ".checkpoint-30.old.partial"):
        (store.folder / name).mkdir()
    store.remove_leftovers()
    names = sorted(path.name for path in store.folder.iterdir())
    assert names == [".lock", "checkpoint-10", "checkpoint-20", "checkpoint-30"]


def test_later_ones_are_removed_after_going_back(store: CheckpointStore, lines: list[str]) -> None:
    store.discard_after(10)
    assert store.steps() == [10]
    assert len(lines) == 2


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["tensors", "json", "publish"])
def test_a_full_disk_leaves_the_last_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def write(folder: Path) -> None:
        fill(folder)
        if call == "tensors":
            no_space()
        if call == "json":
            monkeypatch.setattr(Path, "write_text", no_space)
        if call == "publish":
            monkeypatch.setattr(store_module, "publish_folder", no_space)

    with pytest.raises(
        UserError, match="Disk full: checkpoint-40 cannot be written.*checkpoint-30 is intact.*--resume"
    ):
        store.save(40, write, {}, 1)
    monkeypatch.undo()
    assert sorted(path.name for path in store.folder.iterdir() if path.name != ".lock") == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-30",
    ]
    assert damage(store.path(30)) is None
    store.save(40, fill, {}, 1)  # after some space was freed


def test_too_little_space_is_seen_before_the_write(store: CheckpointStore) -> None:
    with pytest.raises(UserError, match="Disk full: checkpoint-40 needs .*checkpoint-30 is intact"):
        store.save(40, fill, {}, 2**60)


def test_a_folder_with_a_training_is_refused(store: CheckpointStore, tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "other")
    with claim(other, RunSettings()) as held:
        held.save(5, fill, {}, 1)
    with (
        pytest.raises(UserError, match="checkpoint-5.*--resume auto.*--overwrite.*--output_dir"),
        claim(other, RunSettings()),
    ):
        pass
    with (
        pytest.raises(UsageError, match="exclude each other"),
        claim(other, RunSettings(resume="auto", overwrite=True)),
    ):
        pass
    with claim(other, RunSettings(overwrite=True)) as held:
        assert held.steps() == [5]  # nothing is deleted before the training starts
        held.discard_all()
        assert held.steps() == []


def test_a_finished_run_is_refused_too(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.final_adapter.mkdir()
    with pytest.raises(UserError, match="final_adapter"), claim(run, RunSettings()):
        pass


def test_state_is_json(store: CheckpointStore) -> None:
    assert json.loads((store.path(30) / "state.json").read_text()) == {"step": 30}
