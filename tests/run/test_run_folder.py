"""Atomic writes, the run folder, the stage cache."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.run import atomic
from unsloth_factory.run.folder import RunFolder, RunManifest
from unsloth_factory.run.stages import StageCache, file_identity, stage_key


def test_write_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "state.json"
    atomic.write_json(path, {"x": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"state.json cannot be written: No space left"):
        atomic.write_json(path, {"x": 2})
    assert path.read_text() == '{\n  "x": 1\n}\n'
    assert os.listdir(path.parent) == ["state.json"]


def test_published_files_are_readable_by_others(tmp_path: Path) -> None:
    temporary = tmp_path / ".x.partial"
    temporary.write_text("x")
    temporary.chmod(0o600)
    final = atomic.publish_file(temporary, tmp_path / "x")
    assert stat.S_IMODE(final.stat().st_mode) == 0o644


def test_publish_folder_replaces(tmp_path: Path) -> None:
    final = tmp_path / "model"
    for text in ("old", "new"):
        temporary = tmp_path / ".model.partial"
        temporary.mkdir()
        (temporary / "w").write_text(text)
        atomic.publish_folder(temporary, final)
        assert (final / "w").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_sums_find_every_damage(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name * 100)
    atomic.write_sums(tmp_path, ["a", "b", "c"])
    assert atomic.verify_sums(tmp_path) == []
    (tmp_path / "a").write_text("b" + "a" * 99)
    (tmp_path / "b").unlink()
    assert atomic.verify_sums(tmp_path) == ["a", "b"]


def test_free_space(tmp_path: Path) -> None:
    atomic.require_free_space(tmp_path / "not" / "there", 1, "nothing")
    with pytest.raises(UserError, match=r"the merge needs 1048576.00 GiB in .*GiB are free"):
        atomic.require_free_space(tmp_path, 1 << 50, "the merge")


def test_nan_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "x.json", {"loss": float("nan")})


def test_manifest_round_trip(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    manifest = RunManifest(
        command="sft", model="tiny", base_fingerprint="f", thinking="off", domain="medical", system="你"
    )
    run.write(manifest)
    assert run.read() == manifest
    assert run.read().thinking_flag is False


@pytest.mark.parametrize("text", [None, "", "- a", "command: sft", "a: [", "command: 1\nmodel: 2"])
def test_broken_manifest(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=r"run.yaml|not a run folder"):
        RunFolder(tmp_path).read()


def test_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    program = (
        "import sys, pathlib\nfrom unsloth_factory.run.folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).lock(): print('in')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with run.lock():
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "in use by another training" in refused.stderr
    assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "in\n"


def test_stage_cache(tmp_path: Path) -> None:
    source, result = tmp_path / "in.txt", tmp_path / "out" / "w"
    source.write_text("1")
    result.parent.mkdir()
    result.write_text("result")
    cache = StageCache(tmp_path / "stages.json")
    key = stage_key("sft", {"epochs": 1}, [source], ["up"])
    assert cache.hit("sft", key) is None
    cache.store("sft", key, [result.parent], {"loss": 1.0})
    hit = cache.hit("sft", key)
    assert hit is not None
    assert hit["figures"] == {"loss": 1.0}
    assert stage_key("sft", {"epochs": 2}, [source], ["up"]) != key
    assert stage_key("sft", {"epochs": 1}, [source], ["other"]) != key
    source.write_text("2")
    assert stage_key("sft", {"epochs": 1}, [source], ["up"]) != key
    result.write_text("edited")
    assert cache.hit("sft", key) is None
    cache.forget("sft")
    assert cache.hit("sft", key) is None
    (tmp_path / "stages.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        cache.hit("sft", key)


def test_large_files_are_known_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unsloth_factory.run import stages

    monkeypatch.setattr(stages, "WHOLE_FILE_LIMIT", 100)
    monkeypatch.setattr(stages, "END_BYTES", 10)
    path = tmp_path / "big"
    path.write_bytes(b"a" * 200)
    before = file_identity(path)
    path.write_bytes(b"a" * 199 + b"b")
    assert file_identity(path) != before
    assert file_identity(tmp_path / "none") == "missing"
