"""Each command of docs/evaluation.md is one that the parser takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.parse import parse

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"


def test_commands_and_choices_of_the_page():
    text = PAGE.read_text(encoding="utf-8")
    commands = re.findall(r"^uf evaluate (.+)$", text, re.MULTILINE)
    assert len(commands) == 5
    configs = [parse(EvaluateConfig, shlex.split(command)).config for command in commands]
    assert configs[2].models == "tiny,output/mine,org/other"
    assert configs[0].thinking_budget == 512
    for name in ("number", "exact", "contains", "f1"):
        assert f"| `{name}` |" in text
