"""Every command of docs/judging.md is one."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from unsloth_factory.config.fields import settings_of
from unsloth_factory.config.parse import parse
from unsloth_factory.config.table import COMMANDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "judging.md"


def test_the_commands_parse():
    text = PAGE.read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("uf ")]
    assert len(commands) >= 10
    for name, *words in commands:
        parse(COMMANDS[name].config_type, words, command=name)
    known = {flag for entry in COMMANDS.values() for flag in settings_of(entry.config_type)}
    assert set(re.findall(r"`--(\w+)", text)) <= known
