"""Write the tables of docs/reliability.md from the tests that hold them: python scripts/reliability_table.py [--check]

A row is a fault, a security item or a target; its tests are those of tests/reliability (and tests/torture) whose names
begin with the row's. What happens is said by their docstrings, so that the page cannot promise what no test does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- tables: written by scripts/reliability_table.py -->", "<!-- end of the tables -->"

FAULTS = {
    "01": "kill -9 at a random instant of training",
    "02": "kill -9 inside the save",
    "03": "SIGTERM, Ctrl-C",
    "04": "newest checkpoint truncated",
    "05": "one flipped byte in any checkpoint file",
    "06": "all checkpoints damaged",
    "07": "disk full at a checkpoint",
    "08": "disk full in merge, convert, quantise",
    "09": "too little disk before the start",
    "10": "resume with another batch size",
    "11": "resume with changed data, seed, base, template, rank",
    "12": "two runs in one folder",
    "13": "out of memory at step k",
    "14": "out of memory with one sample",
    "15": "killed by the kernel",
    "16": "NaN or infinite loss",
    "17": "NaN in base, adapter or GGUF weights",
    "18": "float16 overflow",
    "19": "bfloat16 asked for on a T4",
    "20": "every label masked",
    "21": "truncated last line, bad JSON lines",
    "22": "byte-order mark, CRLF, blank lines, U+2028",
    "23": "UTF-16, GBK, Latin-1",
    "24": "NUL, lone surrogate, 1e400, NaN literal, doubled key",
    "25": "type changes within a column",
    "26": "20 MB row, 2,000-deep nesting, empty file",
    "27": "empty answers, answers that repeat the question",
    "28": "exact and near duplicates",
    "29": "leaks between training and held-out rows",
    "30": "control tokens in a user's text",
    "31": "roles out of order",
    "32": "chosen equals rejected",
    "33": "YAML surprises",
    "34": "unknown keys and typos",
    "35": "adapter of another base",
    "36": "adapters that GGUF gets wrong (rsLoRA, alpha_pattern, DoRA)",
    "37": "damaged GGUF files",
    "38": "damage that every loader accepts",
    "39": "tokenizer or template differs in the GGUF file",
    "40": "native crash in a child",
    "41": "bad requests to a server",
    "42": "llama.cpp dies in the middle of an answer",
    "43": "Ollama fails",
    "44": "clock jumps, read-only folders, no HOME, no network",
    "45": "spaces, Chinese, emoji, 255 bytes, links in names",
}
SECURITY = {
    "pickle": "pickle and torch.load",
    "version_floors": "weights_only is no boundary",
    "checkpoint_is_no_code": "a checkpoint is code",
    "trust_remote_code": "trust_remote_code",
    "only_language_models": "architectures that load others",
    "adapter_config": "what an adapter's config names",
    "command_injection": "command injection",
    "nothing_is_fetched_by_url": "requests on another's behalf",
    "path_traversal": "path traversal",
    "archive_bomb": "archives",
    "addresses": "open ports, CORS",
    "jinja": "chat templates",
    "special_tokens": "special-token injection",
    "gguf_parser": "GGUF parsers",
    "children_end": "children that outlive the command",
    "yaml": "YAML",
    "modelfile": "Modelfile injection",
    "code_that_a_model_wrote": "code that a model wrote",
    "secrets": "secrets",
    "supply_chain": "supply chain",
    "file_modes": "file modes",
    "temporary_files": "temporary files",
    "integrity": "integrity of what ships",
    "no_outbound": "no network unless asked",
}
TARGETS = {
    "bad_input": "bad input of every kind",
    "atomic": "fail the Nth write, flush or rename",
    "determinism": "the same bytes twice",
    "gguf_fuzz": "mutated GGUF headers",
}


@dataclass(frozen=True)
class Test:
    """One test function."""

    name: str
    says: str
    """First paragraph of its docstring, on one line."""


def tests() -> Iterator[Test]:
    """All test functions of the reliability folder."""
    for path in sorted((ROOT / "tests" / "reliability").glob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                text = (ast.get_docstring(node) or "").split("\n\n")[0]
                yield Test(node.name, " ".join(text.split()))


def table(title: str, prefix: str, rows: dict[str, str], known: list[Test]) -> list[str]:
    """Lines of one table.

    Raises:
        SystemExit: A row has no test, or none that says what happens.
    """
    lines = [f"## {title}", "", "| row | what | what happens | tests |", "|---|---|---|---|"]
    for key, what in rows.items():
        start = f"test_{prefix}_{key}"
        mine = [test for test in known if test.name == start or test.name.startswith(start + "_")]
        says = " ".join(test.says for test in mine if test.says).replace("|", "\\|")
        if not says:
            raise SystemExit(f"{prefix} {key} ({what}): no test {start}... with a docstring")
        names = "<br>".join(f"`{test.name}`" for test in mine)
        lines.append(f"| {key.lstrip('0') if key.isdigit() else ''} | {what} | {says} | {names} |")
    return [*lines, ""]


def page() -> str:
    """The page with its tables made anew.

    Raises:
        SystemExit: A row without a test, or a test without a row.
    """
    known = list(tests())
    rows = [f"test_fault_{key}" for key in FAULTS] + [f"test_security_{key}" for key in SECURITY]
    rows += [f"test_target_{key}" for key in TARGETS]
    homeless = [t.name for t in known if t.name.split("_")[1] in ("fault", "security", "target")]
    homeless = [name for name in homeless if not any(name == row or name.startswith(row + "_") for row in rows)]
    if homeless:
        raise SystemExit(f"tests without a row: {', '.join(homeless)}")
    made = [
        *table("Faults and bad input", "fault", FAULTS, known),
        *table("Security", "security", SECURITY, known),
        *table("Targets", "target", TARGETS, known),
    ]
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n" + "\n".join(made) + f"\n{END}" + rest.split(END)[1]


def main() -> None:
    """Write the page, or with --check say whether it is up to date."""
    made = page()
    if "--check" in sys.argv[1:]:
        if made != PAGE.read_text(encoding="utf-8"):
            raise SystemExit(f"{PAGE.name} is not up to date: run python scripts/reliability_table.py")
        return
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
