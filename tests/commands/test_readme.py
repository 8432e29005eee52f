"""Every command that a README shows is one that works."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from command_line import NOBODY, ROOT, uf, write_gbk

from unsloth_factory.commands.run import read_plan
from unsloth_factory.config.fields import settings_of
from unsloth_factory.config.parse import canonical, parse
from unsloth_factory.config.table import COMMANDS

READMES = ("README.md", "README_zh.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(uf [a-z][^`]*|--[a-z][^`]*|make [a-z]+)`")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    """Fenced blocks of one language, comments of shell lines removed."""
    return [body for kind, body in FENCE.findall(text_of(name)) if kind == language]


def commands(name: str) -> list[list[str]]:
    """The simple commands of all shell blocks, as words."""
    lines = "\n".join(blocks(name, "bash")).splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;", re.sub(r"\s#.*", "", line))]
    return [words for words in map(shlex.split, parts) if words]


def uf_lines(name: str) -> list[list[str]]:
    """Arguments of each `uf` command in a block."""
    return [words[1:] for words in commands(name) if words[0] == "uf"]


def settings_file(words: list[str], home: Path) -> list[str]:
    """The settings file that a line names must exist; an empty one does."""
    for word in words:
        if word.endswith(".yaml"):
            (home / word).write_text("epochs: 2\n", encoding="utf-8")
    return words


def inline(name: str) -> list[list[str]]:
    """Words of each `uf ...`, `--flag ...` and `make ...` in the running text."""
    return [shlex.split(found) for found in INLINE.findall(FENCE.sub("", text_of(name)))]


def test_both_languages_show_the_same():
    first, second = READMES
    assert commands(first) == commands(second)
    assert blocks(first, "yaml") == blocks(second, "yaml")
    own = [[words for words in inline(name) if words[0] != "uf" or words[1].isascii()] for name in READMES]
    strip = [{tuple(words) for words in lines if "COMMAND" not in words} for lines in own]
    assert strip[0] == strip[1]
    assert len(uf_lines(first)) >= 6


@pytest.mark.parametrize("name", READMES)
def test_every_command_and_flag_exists(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = {command: settings_of(entry.config_type) for command, entry in COMMANDS.items()}
    every = {flag: "" for table in tables.values() for flag in table} | {"help": ""}
    for words in [*uf_lines(name), *(words[1:] for words in inline(name) if words[0] == "uf")]:
        if words[0] in ("COMMAND", "命令", "help"):
            continue
        assert words[0] in COMMANDS, words
        parse(COMMANDS[words[0]].config_type, settings_file(words[1:], tmp_path), command=words[0])
    flags = [word for words in inline(name) for word in words if word.startswith("--")]
    assert flags
    for flag in flags:
        name_of = flag[2:].partition("=")[0]
        known = any(canonical(name_of, table) in table for table in tables.values())
        assert known or name_of in every, flag
    shown = set(re.findall(r"^\| `uf ([a-z]+)` \|", text_of(name), re.MULTILINE))
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("name", READMES)
def test_make_targets_files_and_extras_exist(name):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = [words[1] for words in [*commands(name), *inline(name)] if words[0] == "make"]
    assert {"demo", "test"} <= set(asked) <= targets
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = set(re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
    (install,) = (words for words in commands(name) if words[0] == "pip" and "-e" in words)
    assert set(re.search(r"\[(.*)\]", install[-1])[1].split(",")) <= extras
    assert set(re.findall(r"^\| `(\w+)` \|", text_of(name), re.MULTILINE)) == extras
    assert (ROOT / "constraints.txt").is_file()
    for anchor in re.findall(r"\]\(#([^)]+)\)", text_of(name)):
        assert re.search(rf"^## {anchor}$", text_of(name), re.MULTILINE | re.IGNORECASE), anchor


@pytest.mark.parametrize("name", READMES)
def test_linked_pages_exist(name):
    for link in re.findall(r"\]\(([^)#:]+)\)", text_of(name)):
        assert (ROOT / link).is_file(), link


def small(words: list[str], home: Path) -> list[str]:
    """A README's command on the bundled model, a small file, and a folder of the test."""
    swap = {"Qwen/Qwen3-8B": "tiny", "data.csv": str(home / "data.csv"), "output/doctor": str(home / "doctor")}
    words = [swap.get(word, word) for word in words]
    extra = {
        "sft": ["--max_seq_length", "256", "--batch_size", "1", "--max_steps", "2", "--val_split", "2"],
        "validate": ["--max_new_tokens", "8"],
        "deploy": ["--ollama_host", NOBODY],
    }
    return [*words, *extra.get(words[0], [])]


def test_the_real_job_runs_as_shown(tmp_path):
    write_gbk(tmp_path / "data.csv", 8)
    job = [words for words in uf_lines("README.md") if any("output/doctor" in word for word in words)]
    assert [words[0] for words in job] == ["sft", "validate", "merge", "gguf", "quantize", "deploy"]
    for words in job:
        outcome = uf(*small(words, tmp_path))
        assert outcome.code == 0, f"uf {shlex.join(words)}\n{outcome.err}"
    assert (tmp_path / "doctor" / "gguf" / "doctor-q4_k_m.gguf").is_file()
    assert (tmp_path / "doctor" / "Modelfile").is_file()
    tree = text_of("README.md").split("output/doctor/\n", 1)[1].split("```", 1)[0]
    for entry in re.findall(r"^  ([\w./-]+)((?:  [\w./-]+)*)", tree, re.MULTILINE):
        for shown in f"{entry[0]}{entry[1]}".split():
            if re.fullmatch(r"[\w.-]+(/|\.\w+)|Modelfile|SHA256SUMS", shown) and "evaluation" not in shown:
                pattern = shown.rstrip("/").replace("-N", "-*")
                assert list((tmp_path / "doctor").glob(pattern)), shown


def test_the_plan_is_one(tmp_path):
    (block,) = blocks("README.md", "yaml")
    plan = tmp_path / "plan.yaml"
    plan.write_text(block, encoding="utf-8")
    root, stages = read_plan(plan, None)
    assert root == Path("output/doctor")
    expected = ["sft", "validate", "evaluate", "merge", "gguf", "quantize", "validate-2", "deploy"]
    assert [stage.label for stage in stages] == expected
    assert stages[0].config.model.model == yaml.safe_load(block)["model"]


def test_help_works():
    assert uf("help").code == 0
    for command, entry in COMMANDS.items():
        outcome = uf(command, "--help")
        assert outcome.code == 0
        for flag in settings_of(entry.config_type):
            assert f"--{flag}" in outcome.out
