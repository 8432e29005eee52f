"""`uf` in this process, and the little data that the tests of the command line work on."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from unsloth_factory.cli import main

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "unsloth_factory" / "assets" / "demo"
NOBODY = "127.0.0.1:9"  # the discard port: no server answers there
# Little work: 128 tokens hold every row, one small row a micro-batch.
SMALL = ("--max_seq_length", "256", "--batch_size", "4", "--accumulation_steps", "1", "--learning_rate", "4e-3")


@dataclass
class Outcome:
    """What one command line left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def words(self) -> str:
        """Both outputs on one line, wrapped lines joined."""
        return " ".join((self.out + self.err).split())


def uf(*arguments: object, stdin: str = "") -> Outcome:
    """`uf ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([str(argument) for argument in arguments])
    finally:
        sys.stdin = before
    return Outcome(code, out.getvalue(), err.getvalue())


def rows(count: int) -> list[tuple[str, str]]:
    """(question, answer) of the bundled handbook."""
    lines = (DEMO / "handbook_train.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [(row["instruction"], row["output"]) for row in map(json.loads, lines)]


def write_gbk(path: Path, count: int) -> Path:
    """A csv as a hospital exports it: GBK, department,title,ask,answer."""
    with open(path, "w", encoding="gbk", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["department", "title", "ask", "answer"])
        writer.writerows(["内科", question[:8], question, answer] for question, answer in rows(count))
    return path


def write_pairs(path: Path, count: int) -> Path:
    """Preference pairs: the right answer against the next one's."""
    data = rows(count + 1)
    lines = [
        json.dumps({"prompt": q, "chosen": a, "rejected": data[i + 1][1]}, ensure_ascii=False)
        for i, (q, a) in enumerate(data[:count])
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with size and time of change: equal means that nothing was written."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


@dataclass
class Chain:
    """The finished run and what each command printed."""

    folder: Path
    data: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, label: str, *arguments: object, stdin: str = "") -> Outcome:
        outcome = self.outcomes[label] = uf(*arguments, stdin=stdin)
        assert outcome.code == 0, f"uf {' '.join(map(str, arguments))}\n{outcome.out}\n{outcome.err}"
        return outcome
