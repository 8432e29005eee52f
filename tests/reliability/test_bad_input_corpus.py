"""The corpus of bad files through the real command line: no traceback, no hang, exit code and line number right."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

import bad_settings_corpus as settings  # noqa: E402
from bad_input_corpus import Case, cases, dumps, good_rows  # noqa: E402
from command_line import Outcome, uf  # noqa: E402
from table_files import parquet, workbook  # noqa: E402

from unsloth_factory.config.commands import SftConfig  # noqa: E402
from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.config.parse import parse  # noqa: E402
from unsloth_factory.data.load import load_conversations  # noqa: E402

HANG_SECONDS = 10
ACCEPTED = "the data was accepted"
# More of the random ones: `FUZZ=20000 pytest tests/reliability/test_bad_input_corpus.py`.
FUZZ = int(os.environ.get("FUZZ", "300"))
DATA = cases()
FAMILIES = sorted({case.family for case in DATA})


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Every file has HANG_SECONDS; `begin` starts the clock."""

    def stop(*_: object) -> None:
        raise AssertionError(f"a file took more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def stop_behind_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepted data ends the command before a model is loaded."""

    def accepted(*_: object) -> None:
        raise UserError(ACCEPTED)

    monkeypatch.setattr("unsloth_factory.commands.train._load", accepted)


def faults(made: list[Case], folder: Path, check: Callable[[Case, Path], str | None]) -> list[str]:
    """One line for each case whose fate was another than it must be."""
    wrong = []
    for number, case in enumerate(made):
        path = folder / str(number) / case.name
        path.parent.mkdir()
        path.write_bytes(case.content)
        signal.alarm(HANG_SECONDS)
        fault = check(case, path)
        signal.alarm(0)
        if fault:
            wrong.append(f"{case.family}, {case.label}: {fault}")
    return wrong


def judge(case: Case, path: Path, outcome: Outcome) -> str | None:
    """What is wrong with how the command ended, or nothing."""
    messages = [line for line in outcome.err.splitlines() if line.startswith("uf: ")]
    shown = f"{outcome.code} {outcome.err[:400]}"
    if "Traceback" in outcome.err + outcome.out or len(messages) != 1:
        return f"not one message: {shown}"
    if outcome.code != {"usage": 2}.get(case.fate, 1):
        return f"exit code: {shown}"
    if case.fate == "either":
        return None
    if ACCEPTED in outcome.err:
        return "accepted"
    if case.fate == "refused" and case.name not in outcome.err and str(path.parent) not in outcome.err:
        return f"the file is not named: {shown}"
    said = outcome.err.replace(str(path.parent), "")  # the folder's name has words of the test
    if case.line and not any(f"{mark}{case.line}{end}" in said for mark in ("line ", ":") for end in ":, "):
        return f"line {case.line} is not named: {shown}"
    return None if case.says in said else f"{case.says!r} is not said: {shown}"


def judge_rows(case: Case, path: Path) -> str | None:
    """Every good row kept, the bad one named with its number."""
    data = parse(SftConfig, ["--dataset", str(path), *case.flags]).config.data
    items, report = load_conversations(data)
    found = f"{len(items)} rows kept, left out: {report.skipped_examples}"
    if len(items) != 6 or len(report.skipped_examples) != 1:
        return found
    where, _, reason = report.skipped_examples[0].partition(" ")
    right = where == f"{path.name}:{case.line}" and any(part in reason for part in case.says.split("|"))
    return None if right else found


def sft(path: Path, *flags: object) -> Outcome:
    line = ("sft", "--model", "tiny", "--dataset", path, "--output_dir", path.parent / "out", "--val_split", 0)
    return uf(*line, *flags)


def test_target_bad_input_corpus() -> None:
    """600 bad files, the same bytes from the same seed; through the real command line or its loader, 10 s for each."""
    made = [*DATA, *settings.settings_cases(), *settings.registry_cases(), *settings.pack_cases()]
    made += [*settings.plan_cases(), *settings.template_cases()]
    assert len(made) >= 600
    assert len({(case.name, case.content, case.flags) for case in made}) >= 500
    assert [case.content for case in cases()] == [case.content for case in DATA], "the same seed, the same bytes"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("stop_behind_the_data")
def test_target_bad_input_data(family: str, tmp_path: Path) -> None:
    """Encodings x shapes x kinds of file x faults: refused by name and line, or the bad row alone left out."""

    def check(case: Case, path: Path) -> str | None:
        return judge_rows(case, path) if case.fate == "row" else judge(case, path, sft(path, *case.flags))

    assert faults([case for case in DATA if case.family == family], tmp_path, check) == []


def test_target_bad_input_settings(tmp_path: Path) -> None:
    """Settings files: exit code 2 with file and line."""
    made = list(settings.settings_cases())
    assert faults(made, tmp_path, lambda case, path: judge(case, path, uf("sft", path))) == []


def test_target_bad_input_plans(tmp_path: Path) -> None:
    """Plans: exit code 2 with the stage."""
    made = list(settings.plan_cases())
    assert faults(made, tmp_path, lambda case, path: judge(case, path, uf("run", path))) == []


def beside(path: Path) -> Path:
    """A good data file in the same folder."""
    data = path.parent / "d.json"
    data.write_text(dumps(good_rows(2)), encoding="utf-8")
    return data


@pytest.mark.usefixtures("stop_behind_the_data")
def test_target_bad_input_registries(tmp_path: Path) -> None:
    """Registries of data sets: refused by file, entry and key."""

    def check(case: Case, path: Path) -> str | None:
        beside(path)
        name = "医" if case.label == "GBK" else "mine"
        line = ("sft", "--model", "tiny", "--dataset", name, "--dataset_dir", path.parent)
        return judge(case, path, uf(*line, "--output_dir", path.parent / "out"))

    assert faults(list(settings.registry_cases()), tmp_path, check) == []


def test_target_bad_input_packs(tmp_path: Path) -> None:
    """Domain packs: exit code 2 with the file."""
    made = list(settings.pack_cases())
    assert faults(made, tmp_path, lambda case, path: judge(case, path, sft(beside(path), "--domain", path))) == []


def test_target_bad_input_templates(tmp_path: Path, random_model_dir: Path) -> None:
    """Chat templates: refused before the training."""
    import unsloth_factory.commands.train  # noqa: F401 - torch's import must not run into the clock

    def check(case: Case, path: Path) -> str | None:
        flags = ("--model", random_model_dir, "--chat_template", path, "--max_steps", 1)
        return judge(case, beside(path), sft(beside(path), *flags))

    made = [Case(**{**vars(case), "name": "chat template"}) for case in settings.template_cases()]
    assert faults(made, tmp_path, check) == []


def special_files(folder: Path) -> dict[str, Path]:
    """What is no file, or one that never ends."""
    made = {name: folder / f"{name}.jsonl" for name in ("folder", "pipe", "loop", "dangling")}
    made["folder"].mkdir()
    os.mkfifo(made["pipe"])
    made["loop"].symlink_to(made["loop"])
    made["dangling"].symlink_to(folder / "nothing")
    made |= {"zero": folder / "zero.jsonl", "long": folder / ("长" * 90 + ".jsonl"), "below": made["pipe"] / "d.jsonl"}
    made["zero"].symlink_to("/dev/zero")
    return made


@pytest.mark.usefixtures("stop_behind_the_data")
def test_target_bad_input_special_files(tmp_path: Path) -> None:
    """Folders, pipes, devices, link loops and impossible names as data: refused at once."""
    for name, path in special_files(tmp_path).items():
        signal.alarm(HANG_SECONDS)
        fault = judge(Case("special", name, "jsonl", b"", "refused"), path, sft(path))
        assert fault is None, f"{name}: {fault}"
    for name in ("~nobody-of-this-name/d.jsonl", "\udcff.jsonl"):
        outcome = uf("sft", "--model", "tiny", "--dataset", name, "--output_dir", tmp_path / "out")
        assert outcome.code in (1, 2), outcome.err
        assert outcome.err.count("uf: ") == 1, outcome.err


@pytest.mark.usefixtures("stop_behind_the_data")
def test_target_bad_input_long_lists(tmp_path: Path) -> None:
    names = [tmp_path / f"{number:050}.jsonl" for number in range(40)]
    for name in names:
        name.write_text(dumps(good_rows(1)[0]), encoding="utf-8")
    assert ACCEPTED in sft(tmp_path / "x", "--dataset", ",".join(map(str, names))).err


def mutated(source: random.Random, content: bytes) -> bytes:
    """One to four random changes: a byte, a cut, a piece twice, a piece of noise, a piece moved."""
    for _ in range(source.randint(1, 4)):
        a, b = sorted(source.randrange(len(content) + 1) for _ in range(2))
        content = source.choice(
            (
                content[:a] + source.randbytes(1) + content[a + 1 :],
                content[:a] + content[b:],
                content[:b] + content[a:b] + content[b:],
                content[:a] + source.randbytes(8) + content[a:],
                content[b:] + content[:a],
            )
        )
    return content


@pytest.mark.usefixtures("stop_behind_the_data")
def test_target_bad_input_random_files(tmp_path: Path) -> None:
    """Good files with random changes: read or refused, never a traceback."""
    source = random.Random(7)
    rows = good_rows(4)
    talks = [{"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}] * 3
    lines = "\n".join(map(dumps, rows)).encode()
    whole = {
        "d.jsonl": [lines, "\n".join(map(dumps, talks)).encode("utf-16"), lines.decode().encode("gbk")],
        "d.json": [dumps(rows).encode(), dumps({"data": talks}).encode()],
        "d.csv": ["question,answer\n问,答\n你,我\n".encode("gbk"), b'question;answer\n"a";"b"\n'],
        "d.txt": ["问\n答\n\n问\n答\n".encode()],
        "d.xlsx": [workbook([["question", "answer"], ["a", "b"]])],
        "d.parquet": [parquet(rows)],
    }
    made = []
    for number in range(FUZZ):
        name = source.choice(list(whole))
        made.append(Case("random", str(number), name, mutated(source, source.choice(whole[name])), "either"))
    assert faults(made, tmp_path, lambda case, path: judge(case, path, sft(path))) == []


def test_target_bad_input_random_settings(tmp_path: Path) -> None:
    source = random.Random(8)
    text = b"model: tiny\ndataset: [a, b]\nepochs: 3\ncolumns: {prompt: a}\nlearning_rate: 1e-4\nno_packing: yes\n"
    for number in range(FUZZ):
        path = tmp_path / f"{number}.yaml"
        path.write_bytes(mutated(source, text))
        signal.alarm(HANG_SECONDS)
        try:
            parse(SftConfig, [str(path)])
        except UserError:
            continue


def test_target_bad_input_judge(tmp_path: Path) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    with pytest.raises(AssertionError, match="took more than"):
        time.sleep(1)
    path = tmp_path / "d.jsonl"
    right = Outcome(1, "", f"uf: {path} line 3: broken JSON")
    case = Case("f", "l", "d.jsonl", b"", "refused", 3, "broken")
    assert judge(case, path, right) is None
    for wrong in (
        Outcome(0, "", right.err),
        Outcome(1, "", right.err.replace("3", "4")),
        Outcome(1, "", right.err + "\nuf: again"),
        Outcome(1, "Traceback", right.err),
        Outcome(1, "", f"uf: {path} line 3: empty"),
        Outcome(1, "", "uf: line 3: broken"),
        Outcome(1, "", f"uf: {ACCEPTED} d.jsonl line 3: broken"),
    ):
        assert judge(case, path, wrong), wrong
