"""Bad files by the hundred, each with what must become of it; the same seed makes the same bytes.

Encodings x shapes x kinds of file x faults. `test_bad_input_corpus.py` feeds them to the real loader and the real
command line.
"""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from table_files import archive, parquet, workbook

ENCODINGS = ("utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16")
GOOD = 6  # good rows around each fault


@dataclass(frozen=True)
class Case:
    """One file. `fate` is what must happen:

    refused: exit code 1, one message that names the file, and `line` where there is one.
    row: every good row is kept, and the report names row `line` alone.
    either: refused or read; anything but a traceback or a hang (bytes changed at random).
    usage: exit code 2, and the message names `line`.
    """

    family: str
    label: str
    name: str
    content: bytes
    fate: str
    line: int | None = None
    says: str = ""
    flags: tuple[str, ...] = ()


def good_rows(count: int) -> list[dict[str, str]]:
    return [{"instruction": f"问题{i}：高血压患者要注意什么？", "output": f"第{i}点，低盐饮食。"} for i in range(count)]


def dumps(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# Lines that no JSON reader accepts.
BROKEN_LINES = {
    "cut": '{"instruction": "问", "outp',
    "cut string": '{"instruction": "问", "output": "答',
    "no colon": '{"instruction" "问", "output": "答"}',
    "no comma": '{"instruction": "问" "output": "答"}',
    "comma at end": '{"instruction": "问", "output": "答",}',
    "single quotes": "{'instruction': '问', 'output': '答'}",
    "no quotes": '{instruction: "问", output: "答"}',
    "two objects": '{"instruction": "问", "output": "答"}{"instruction": "问", "output": "答"}',
    "text behind": '{"instruction": "问", "output": "答"} end',
    "comma behind": '{"instruction": "问", "output": "答"},',
    "comment": '{"instruction": "问", "output": "答"} // note',
    "python": '{"instruction": "问", "output": None}',
    "tab in text": '{"instruction": "问", "output": "答\t答"}',
    "escape": '{"instruction": "问", "output": "C:\\windows"}',
    "half escape": '{"instruction": "问", "output": "\\u12"}',
    "inner quote": '{"instruction": "问", "output": "他说"好""}',
    "array cut": '["问", "答"',
    "html": "<html><body>404</body></html>",
    "csv": "问,答",
    "git": "<<<<<<< HEAD",
    "brace": "}",
}
# Rows that are JSON and cannot be trained on; the text is the reason in the report.
BAD_ROWS = {
    '{"instruction": "问", "output": NaN}': "NaN",
    '{"instruction": "问", "output": "答", "score": -Infinity}': "-Infinity",
    '{"instruction": "问", "output": 1e400}': "too large",
    f'{{"instruction": "问", "output": {"9" * 5000}}}': "too large",
    '{"instruction": "问", "output": "答", "output": "乙"}': "'output' appears twice",
    '{"instruction": "问", "output": "\\ud83d"}': "surrogate",
    '{"instruction": "\\udc00问", "output": "答"}': "surrogate",
    '{"instruction": "问", "output": "答", "\\ud83d": 1}': "surrogate",
    '{"instruction": "问", "output": "答\\u0000"}': "NUL",
    '["问", "答"]': "list",
    '"问"': "str",
    "17": "int",
    "null": "NoneType",
    f'{{"instruction": "问", "output": {"[" * 2000}1{"]" * 2000}}}': "nested|list",
    '{"instruction": "问", "output": ' + '{"a":' * 2000 + "1" + "}" * 2001: "nested|dict",
    '{"instruction": "问", "output": null}': "missing",
    '{"instruction": "问"}': "missing",
    '{"instruction": "问", "output": true}': "bool",
    '{"instruction": "问", "output": ["答"]}': "list",
    '{"instruction": "问", "output": {"text": "答"}}': "dict",
    '{"instruction": "问", "output": ""}': "empty answer",
    '{"instruction": "问", "output": " \\n\\t "}': "empty answer",
    '{"instruction": "问", "output": "\\u3000"}': "empty answer",
    '{"instruction": "", "output": "答"}': "empty question",
    '{"instruction": ["问"], "output": "答"}': "list",
    '{"instruction": "问", "output": "<think>想"}': "think",
    '{"instruction": "问", "output": "答", "history": 3}': "history",
    '{"instruction": "问", "output": "答", "history": [["问"]]}': "history",
    '{"instruction": "问", "output": "答", "images": ["a.png"]}': "images",
    "{}": "missing",
}
_USER, _ANSWER = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}
_SYSTEM = {"role": "system", "content": "规"}
BAD_TALKS = (
    [],
    [_USER],
    [_SYSTEM],
    [_SYSTEM, _USER],
    [_ANSWER],
    [_ANSWER, _USER, _ANSWER],
    [_SYSTEM, _SYSTEM, _USER, _ANSWER],
    [_USER, _SYSTEM, _ANSWER],
    [_USER, _ANSWER, _SYSTEM],
    [_USER, {"role": "narrator", "content": "旁白"}],
    [_USER, {"role": None, "content": "答"}],
    [_USER, {"role": "assistant"}],
    [_USER, {"role": "assistant", "content": None}],
    [_USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}],
    [_USER, {"role": "assistant", "content": {"text": "答"}}],
    [_USER, {"role": "assistant", "content": "", "tool_calls": [{}]}],
    ["问", "答"],
    [[_USER, _ANSWER]],
    "问答",
    None,
    7,
    {"role": "user", "content": "问"},
)  # fmt: skip


def cases(seed: int = 3407) -> list[Case]:
    """The corpus."""
    source = random.Random(seed)
    found: list[Case] = []
    for family in (broken_lines, bad_rows, bad_talks, arrays, tables, texts, encodings, binaries, sizes, other_kinds):
        found += family(source)
    return found


def broken_lines(source: random.Random) -> Iterator[Case]:
    for number, (label, line) in enumerate(BROKEN_LINES.items()):
        for encoding in (ENCODINGS[number % 5], ENCODINGS[(number + 2) % 5]):
            at = source.randrange(2, GOOD + 2)
            lines = [dumps(row) for row in good_rows(GOOD)]
            lines.insert(at - 1, line)
            content = "\n".join(lines).encode(encoding)
            yield Case("broken line", f"{label} {encoding}", "d.jsonl", content, "refused", at, "broken JSON")
            yield Case("broken line skipped", f"{label} {encoding}", "d.jsonl", content, "row", at, "broken JSON",
                       ("--bad_rows", "skip"))  # fmt: skip


def bad_rows(source: random.Random) -> Iterator[Case]:
    for number, (line, reason) in enumerate(BAD_ROWS.items()):
        at = source.randrange(1, GOOD + 2)
        lines = [dumps(row) for row in good_rows(GOOD)]
        lines.insert(at - 1, line)
        encoding = ENCODINGS[number % 5]
        end = ("\n", "\r\n", "\n\n")[number % 3]
        at_line = 2 * at - 1 if end == "\n\n" else at
        yield Case("bad row", reason, "d.jsonl", end.join(lines).encode(encoding), "row", at_line, reason)
        if "nested" not in reason:
            array = ("[" + ",\n".join(lines) + "]").encode(encoding)
            yield Case("bad item", reason, "d.json", array, "row", at, reason)
        alone = line.encode(encoding)
        yield Case("bad row alone", reason, "d.jsonl", alone, "refused")


def bad_talks(source: random.Random) -> Iterator[Case]:
    for number, talk in enumerate(BAD_TALKS):
        rows = [dumps({"messages": [_USER, _ANSWER]}) for _ in range(GOOD)]
        at = source.randrange(1, GOOD + 2)
        rows.insert(at - 1, dumps({"messages": talk}))
        yield Case("bad talk", dumps(talk)[:40], "d.jsonl", "\n".join(rows).encode(ENCODINGS[number % 5]), "row", at)


def arrays(source: random.Random) -> Iterator[Case]:
    rows = [dumps(row) for row in good_rows(GOOD)]
    whole = "[\n" + ",\n".join(rows) + "\n]"
    for _ in range(16):
        at = source.randrange(2, GOOD + 2)  # the line that is cut; row 1 stands on line 2
        lines = whole.split("\n")[:at]
        lines[-1] = lines[-1][: source.randrange(2, len(lines[-1]) - 2)]
        content = "\n".join(lines).encode(source.choice(ENCODINGS))
        yield Case("array cut", f"line {at}", "d.json", content, "refused", at, "broken JSON")
    for label, old, new in (
        ("no comma", "},\n", "}\n"),
        ("two commas", "},\n", "},,\n"),
        ("semicolon", "},\n", "};\n"),
        ("python", '"output"', "'output'"),
    ):
        at = source.randrange(2, GOOD)
        parts = whole.split(old)
        content = old.join(parts[:at]) + new + old.join(parts[at:])
        # Row `at` stands on line at + 1; a missing comma is missed where the next row begins.
        line = at + 1 + (label == "no comma")
        yield Case("array fault", label, "d.json", content.encode(), "refused", line, "broken JSON")
    yield Case("array fault", "comma at end", "d.json", whole.replace("\n]", ",\n]").encode(), "refused", GOOD + 2)
    yield Case("array fault", "text behind", "d.json", (whole + "\nend").encode(), "refused", GOOD + 3)
    yield Case("array fault", "nested", "d.json", b"[" * 100_000, "refused", 1, "nested")
    yield Case("array fault", "objects nested", "d.json", b'{"a":' * 100_000, "refused", 1, "nested")
    contents = {"empty": "[]", "wrapped": '{"data": []}', "numbers": "[1, 2]", "strings": '["a", "b"]', "null": "null",
                "object": '{"version": 1}', "string": '"text"', "number": "3", "true": "true",
                "arrays": '[[["问", "答"]]]', "array lines": '["问", "答"]\n["问", "答"]'}  # fmt: skip
    for label, text in contents.items():
        yield Case("array content", label, "d.json", text.encode(), "refused")
    yield Case("columns", "unknown", "d.json", b'[{"frage": "a", "antwort": "b"}]', "refused", None, "--columns")
    wide = dumps([{f"column{i}": "x" for i in range(5000)}]).encode()
    yield Case("columns", "five thousand", "d.json", wide, "refused", None, "--columns")
    late = "{" + ",".join(f'"k{i}":1' for i in range(60_000)) + ',"k59999":2}'
    yield Case("columns", "60,000 keys, one twice", "d.jsonl", late.encode(), "refused", None, "twice")


def _csv(rows: list[tuple[str, ...]], delimiter: str = ",", header: str = "question,answer") -> list[str]:
    return [header.replace(",", delimiter), *[delimiter.join(row) for row in rows]]


def tables(source: random.Random) -> Iterator[Case]:
    good = [(f"问题{i}", f"回答{i}") for i in range(GOOD)]
    for number, encoding in enumerate(ENCODINGS):
        delimiter, name = ((",", "d.csv"), (";", "d.csv"), ("\t", "d.tsv"))[number % 3]
        for label, row, reason in (
            ("too few fields", ("问",), "fields"),
            ("too many fields", ("问", "答", "多"), "fields"),
            ("empty answer", ("问", ""), "empty answer"),
            ("empty question", (" ", "答"), "empty question"),
            ("NUL", ("问\0", "答"), "NUL"),
            ("quote", ('"问"x', "答"), "broken csv"),
        ):
            at = source.randrange(0, GOOD)
            rows = [*good[:at], row, *good[at:]]
            content = "\n".join(_csv(rows, delimiter)).encode(encoding)
            yield Case("csv row", f"{label} {encoding}", name, content, "row", at + 2, reason)
        at = source.randrange(0, GOOD)
        rows = [*good[:at], ('"问', "答"), *good[at:]]
        content = "\n".join(_csv(rows, delimiter)).encode(encoding)
        yield Case("csv", f"open quote {encoding}", name, content, "refused", at + 2, "never closed")
    for label, text, says in (
        ("no header", "问题1,回答1\n问题2,回答2\n", "--columns"),
        ("doubled header", "answer,answer\n问,答\n", "twice"),
        ("header only", "question,answer\n", "no rows"),
        ("delimiter |", "question|answer\n问|答\n", "--columns"),
        ("one column", "question\n问\n", "--columns"),
        ("empty names", ",\n问,答\n", "no rows"),
        ("only quotes", '""""\n', ""),
        ("one quote", '"', ""),
    ):
        yield Case("csv", label, "d.csv", text.encode(), "refused", None, says)


def texts(source: random.Random) -> Iterator[Case]:
    blocks = [f"问题{i}\n回答{i}" for i in range(GOOD)]
    for encoding in ENCODINGS:
        at = source.randrange(0, GOOD)
        for label, block, reason in (("no answer", "问题", "without an answer"), ("NUL", "问\n答\0", "NUL")):
            content = "\n\n".join([*blocks[:at], block, *blocks[at:]]).encode(encoding)
            yield Case("txt", f"{label} {encoding}", "d.txt", content, "row", 3 * at + 1, reason)
    yield Case("txt", "running text", "d.txt", "一行\n两行\n三行\n".encode(), "refused", None, "running text")
    yield Case("txt", "questions only", "d.txt", "一？\n\n二？\n\n三？\n".encode(), "refused")


def encodings(source: random.Random) -> Iterator[Case]:
    foreign = {
        "latin-1": "Où est né l'élève français?",
        "cp1251": "Что делать при повышенном давлении?",
        "koi8-r": "Что делать при повышенном давлении?",
        "big5": "請問高血壓患者平時需要注意什麼，應該怎樣飲食？",
        "shift_jis": "高血圧の患者は何に注意すべきですか？",
        "euc_kr": "고혈압 환자는 무엇을 주의해야 합니까?",
        "cp1256": "ما هي أعراض ارتفاع ضغط الدم؟",
    }
    for encoding, text in foreign.items():
        for name, lines in (
            ("d.jsonl", [dumps({"instruction": text, "output": text + text}) for _ in range(GOOD)]),
            ("d.csv", _csv([(text.replace(",", ""), text.replace(",", ""))] * GOOD)),
        ):
            line = 1 if name == "d.jsonl" else 2
            content = "\n".join(lines).encode(encoding)
            yield Case("foreign", f"{encoding} {name}", name, content, "refused", line, "--encoding")
    for encoding in ("utf-16-le", "utf-16-be"):
        content = "\n".join(dumps({"instruction": "What?", "output": "That."}) for _ in range(9)).encode(encoding)
        yield Case("foreign", encoding, "d.jsonl", content, "refused", None, "utf-16")
    lines = [dumps(row).encode() for row in good_rows(GOOD * 4)]
    for label, bad in {
        "stray byte": b"\xff",
        "cut character": "高".encode()[:2],
        "overlong": b"\xc0\xaf",
        "surrogate": b"\xed\xa0\xbd",
        "latin-1 byte": b"\xe9 ",
    }.items():
        at = source.randrange(1, GOOD * 4)
        damaged = [*lines[: at - 1], lines[at - 1][:-2] + bad + lines[at - 1][-2:], *lines[at:]]
        yield Case("damaged bytes", label, "d.jsonl", b"\n".join(damaged), "refused", at, "damaged")
    content = b"\n".join(lines)
    for encoding, fate in (("utf-16", "refused"), ("ascii", "refused"), ("undefined", "refused"), ("klingon", "usage"),
                           ("rot13", "usage"), ("../../x", "usage")):  # fmt: skip
        yield Case("wrong --encoding", encoding, "d.jsonl", content, fate, None, encoding, ("--encoding", encoding))


def binaries(source: random.Random) -> Iterator[Case]:
    sheet = workbook([["question", "answer"], *[[f"问{i}", f"答{i}"] for i in range(GOOD)]])
    column = parquet(good_rows(GOOD))
    for name, whole in (("d.xlsx", sheet), ("d.parquet", column)):
        for _ in range(10):
            yield Case("cut", name, name, whole[: source.randrange(1, len(whole) - 1)], "refused")
        for _ in range(15):
            place = source.randrange(len(whole))
            flipped = whole[:place] + bytes([whole[place] ^ (1 << source.randrange(8))]) + whole[place + 1 :]
            yield Case("flipped bit", f"{name} {place}", name, flipped, "either")
        noise = source.randbytes(3000)
        yield Case("noise", name, name, whole[:4] + noise, "refused")
    for label, content, says in (
        ("no table", workbook([]), "no rows"),
        ("header only", workbook([["question", "answer"]]), "no rows"),
        ("other columns", workbook([["frage", "antwort"], ["a", "b"]]), "--columns"),
        ("doubled column", workbook([["answer", "answer"], ["a", "b"]]), "twice"),
        ("not a workbook", archive({"a.txt": b"text"}), "xlsx"),
        ("broken sheet", workbook([["question", "answer"], ["a", "</row>"]]), "xlsx"),
    ):
        yield Case("xlsx", label, "d.xlsx", content, "refused", None, says)
    rows: list[list[object]] = [["question", "answer"], *[[f"问{i}", f"答{i}"] for i in range(GOOD)], ["问"]]
    huge = workbook(rows, '<dimension ref="A1:XFD1048576"/>', last=1_048_576)
    yield Case("xlsx", "claims 17 billion cells", "d.xlsx", huge, "row", 1_048_576, "missing")
    with_nulls = [*good_rows(GOOD), {"instruction": "问", "output": None}]
    yield Case("parquet", "null", "d.parquet", parquet(with_nulls), "row", GOOD + 1, "missing")
    for label, rows_ in (("other columns", [{"a": 1}]), ("lists", [{"instruction": ["问"], "output": ["答"]}] * 3),
                         ("no rows", [])):  # fmt: skip
        yield Case("parquet", label, "d.parquet", parquet(rows_), "refused")


def sizes(source: random.Random) -> Iterator[Case]:
    for suffix in ("json", "jsonl", "csv", "tsv", "txt", "parquet", "xlsx"):
        for label, content in (("empty", b""), ("blank", b" \r\n \n"), ("mark", b"\xef\xbb\xbf"), ("one letter", b"x")):
            says = "" if label == "one letter" or (label == "mark" and suffix in ("parquet", "xlsx")) else "empty"
            yield Case("size", f"{label} {suffix}", f"d.{suffix}", content, "refused", None, says)
    rows = [dumps(row) for row in good_rows(GOOD)]
    huge = dumps({"instruction": "问", "output": "x" * 20_000_000})
    yield Case("size", "a row of 20 MB", "d.jsonl", "\n".join([*rows, huge]).encode(), "row", GOOD + 1, "characters")
    yield Case("size", "an item of 20 MB", "d.json", f"[{','.join([*rows, huge])}]".encode(), "row", GOOD + 1, "charac")


def other_kinds(source: random.Random) -> Iterator[Case]:
    text = "\n".join(dumps(row) for row in good_rows(GOOD)).encode()
    kinds: dict[str, tuple[bytes, str]] = {
        "gzip": (b"\x1f\x8b\x08" + zlib.compress(text), "gunzip"),
        "bzip2": (b"BZh9" + source.randbytes(400), "bunzip2"),
        "xz": (b"\xfd7zXZ\x00" + source.randbytes(400), "unxz"),
        "zstd": (b"\x28\xb5\x2f\xfd" + source.randbytes(400), "unzstd"),
        "7z": (b"7z\xbc\xaf\x27\x1c" + source.randbytes(400), "Unpack"),
        "rar": (b"Rar!\x1a\x07" + source.randbytes(400), "Unpack"),
        "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + source.randbytes(400), ".xlsx"),
        "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + source.randbytes(400), "PDF"),
        "gguf": (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "--model"),
        "sqlite": (b"SQLite format 3\x00" + source.randbytes(400), "csv"),
        "png": (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(300), ""),
        "elf": (b"\x7fELF\x02\x01\x01" + bytes(300), ""),
        "noise": (source.randbytes(2000), ""),
    }
    for kind, (content, says) in kinds.items():
        for suffix in ("json", "jsonl", "csv", "txt"):
            yield Case("other kind", f"{kind} as {suffix}", f"d.{suffix}", content, "refused", None, says)
    for suffix in ("docx", "xls", "yaml", "bin", "zip", "gz", "pt", ""):
        yield Case("other name", suffix, f"d.{suffix}".rstrip("."), text, "refused")


Family = Callable[[random.Random], Iterator[Case]]
