"""The README's Python block, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unsloth_factory.config.commands import SftConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.parse import configure

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_python_block(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    rows = "".join(f"第{i}号问题是什么？,答案是{i}。\n" for i in range(24))
    (tmp_path / "data.csv").write_text("question,answer\n" + rows, encoding="gbk")
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks[0], name, "exec"), {})
    eval_loss, adapter = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert 0 < float(eval_loss) < 20
    assert (tmp_path / adapter / "adapter_model.safetensors").is_file()


def test_mistakes_name_the_argument() -> None:
    with pytest.raises(UsageError, match="argument: epoch: unknown setting. Did you mean epochs"):
        configure(SftConfig, epoch=1)
