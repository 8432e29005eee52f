"""SHA256SUMS agrees with the file before, while and after it is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.export import sums
from unsloth_factory.run.atomic import read_sums, sha256


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("dies", ["before the file", "after the file"])
def test_a_kill_while_a_file_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, listed: bool, dies: str
) -> None:
    final, temporary = tmp_path / "x.gguf", tmp_path / ".x.gguf.partial"
    final.write_bytes(b"old")
    if listed:
        sums.write_folder_sums(tmp_path, ["x.gguf"])
    temporary.write_bytes(b"new")
    publish = sums.publish_file

    def killed(source: Path, target: Path) -> None:
        if dies == "after the file":
            publish(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(sums, "publish_file", killed)
    with pytest.raises(KeyboardInterrupt):
        sums.publish_with_sum(temporary, final)
    assert final.read_bytes() == (b"new" if dies == "after the file" else b"old")
    assert sums.verify_file(final) == sha256(final)
    assert len(read_sums(tmp_path)["x.gguf"]) == 2
    monkeypatch.setattr(sums, "publish_file", publish)
    temporary.write_bytes(b"new")
    sums.publish_with_sum(temporary, final)
    assert read_sums(tmp_path) == {"x.gguf": {sha256(final)}}
    final.write_bytes(b"old")
    with pytest.raises(UserError, match="SHA-256 differs"):
        sums.verify_file(final)
