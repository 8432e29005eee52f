"""Rows 20 to 26 of the table of faults: files and rows that cannot be trained on as they are."""

from __future__ import annotations

import json
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

from command_line import SMALL, Outcome, uf  # noqa: E402

from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.config.settings import DataSettings  # noqa: E402
from unsloth_factory.data.load import load_conversations  # noqa: E402
from unsloth_factory.data.template import ChatTemplate  # noqa: E402
from unsloth_factory.data.types import Conversation, DataReport, TokenSample  # noqa: E402

ROWS = [{"instruction": f"问题{i}？", "output": f"回答{i}。"} for i in range(6)]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


def load(path: Path, content: str | bytes, **settings: str) -> tuple[list[Conversation], DataReport]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return load_conversations(DataSettings(dataset=str(path), **settings))


def sft(model: Path, data: Path, *flags: object, code: int = 0) -> Outcome:
    """One optimizer step into `out` beside the data."""
    line = ("sft", "--model", model, "--dataset", data, "--output_dir", data.parent / "out", *SMALL, "--max_steps", 1)
    outcome = uf(*line, *flags)
    assert outcome.code == code, outcome.out + outcome.err
    return outcome


def report_of(data: Path) -> dict:
    return json.loads((data.parent / "out" / "data_report.json").read_text(encoding="utf-8"))


def answers(conversations: list[Conversation]) -> list[str]:
    return [conversation.turns[-1].content for conversation in conversations]


def test_fault_20_every_label_masked(tmp_path, random_model_dir, monkeypatch):
    """An answer that does not fit is left out and named; what is left is trained with a real loss."""
    data = tmp_path / "d.jsonl"
    long = json.dumps({"instruction": "问？", "output": "很长的回答。" * 60}, ensure_ascii=False)
    data.write_text("\n".join([LINES[0], long, *LINES[1:]]), encoding="utf-8")
    sft(random_model_dir, data, "--max_seq_length", 64, "--val_split", 0)
    report = report_of(data)
    assert report["dropped_too_long"] == 1
    assert report["skipped_examples"] == ["d.jsonl:2 longer than 64 tokens"]
    step = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert step["loss"] > 1
    data.write_text("\n".join([long, long]), encoding="utf-8")
    outcome = sft(random_model_dir, data, "--max_seq_length", 64, "--overwrite", code=1)
    for part in ("No sample is left of 2", "--max_seq_length 64", "d.jsonl:1 longer than 64 tokens"):
        assert part in outcome.err

    # A row without any trained token can only come from a broken template; it is refused by its line, too.
    encode = ChatTemplate.encode_conversations

    def masked(self: ChatTemplate, conversations: list[Conversation]) -> list[list[TokenSample]]:
        rows = encode(self, conversations)
        rows[3] = [replace(rows[3][0], trained=np.zeros_like(rows[3][0].trained))]
        return rows

    monkeypatch.setattr(ChatTemplate, "encode_conversations", masked)
    data.write_text("\n".join(LINES), encoding="utf-8")
    outcome = sft(random_model_dir, data, "--overwrite", "--val_split", 0, code=1)
    assert "d.jsonl:4: no token of this row would be trained" in outcome.err


def test_fault_21_truncated_last_line_and_bad_lines(tmp_path, random_model_dir):
    """Refused with every bad line listed; with --bad_rows skip the good rows are kept and the bad ones named."""
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join([*LINES[:2], "{broken", *LINES[2:5], LINES[5][:-9]]), encoding="utf-8")
    outcome = sft(random_model_dir, data, code=1)
    assert "line 3, column 2" in outcome.err
    assert "; line 7, column " in outcome.err
    sft(random_model_dir, data, "--bad_rows", "skip", "--val_split", 0)
    report = report_of(data)
    assert (report["rows"], report["used"]) == (7, 5)
    assert [line.partition(" ")[0] for line in report["skipped_examples"]] == ["d.jsonl:3", "d.jsonl:7"]
    many = "\n".join(["{"] * 60)
    with pytest.raises(UserError, match=r"and 57 more lines: 4, 5, 6, .*, 53, \.\.\."):
        load(tmp_path / "e.jsonl", many)
    array = "[" + ",\n".join(LINES)[:-9]
    with pytest.raises(UserError, match=r"e\.json line 6, .*broken JSON in row 6.*The file ends there|row 6"):
        load(tmp_path / "e.json", array)
    kept, report = load(tmp_path / "e.json", array, bad_rows="skip")
    assert answers(kept) == [row["output"] for row in ROWS[:5]]
    assert report.skipped_examples[0].startswith("e.json:6 broken JSON")
    with pytest.raises(UserError, match=r"1 of 3 rows cannot be used \(e\.jsonl:2 empty answer\).*--bad_rows skip"):
        load(
            tmp_path / "e.jsonl",
            "\n".join([LINES[0], '{"instruction": "a", "output": ""}', LINES[1]]),
            bad_rows="refuse",
        )


def test_fault_22_marks_line_ends_blank_lines(tmp_path):
    """Byte-order mark, CRLF, CR, blank lines and U+2028 inside a text: the same rows."""
    odd = json.dumps({"instruction": "一\u2028二", "output": "三\u2029四\x85五"}, ensure_ascii=False)
    lines = [*LINES, odd]
    expected, _ = load(tmp_path / "a.jsonl", "\n".join(lines))
    assert expected[-1].turns[0].content == "一\u2028二"
    assert len(expected) == 7
    variants = {
        "mark": "\ufeff" + "\n".join(lines),
        "windows": "\r\n".join(lines) + "\r\n",
        "old mac": "\r".join(lines) + "\r",
        "blank lines": "\n\n \n" + "\n\n\t\n".join(lines) + "\n\n",
        "array": "[" + ",\r\n\r\n".join(lines) + "]\n\n",
    }
    for name, text in variants.items():
        for encoding in ("utf-8", "utf-16", "gb18030"):
            found, report = load(tmp_path / "a.jsonl", text.encode(encoding))
            assert [c.turns for c in found] == [c.turns for c in expected], (name, encoding)
            assert report.skipped == {}


def test_fault_23_encodings(tmp_path, random_model_dir):
    """GBK and marked UTF-16 are read and named; what can only be guessed is offered and read on request."""
    data = tmp_path / "d.csv"
    table = "question,answer\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS)
    for encoding, name in (("gbk", "gbk"), ("utf-16", "utf-16"), ("utf-8-sig", "utf-8-sig"), ("gb18030", "gbk")):
        loaded, report = load(data, table.encode(encoding))
        assert answers(loaded) == [row["output"] for row in ROWS]
        assert report.files[0]["encoding"] == name
    data.write_bytes(table.encode("gbk"))
    assert "csv/qa, gbk" in sft(random_model_dir, data).words
    french = "question,answer\n" + "Où est-il né?,À l'école française\n" * 6
    data.write_bytes(french.encode("latin-1"))
    outcome = sft(random_model_dir, data, "--overwrite", code=1)
    assert f"{data} line 2: the text is neither UTF-8 (byte 0xf9) nor readable as GBK" in outcome.err
    assert "If that is right: --encoding cp125" in outcome.err
    loaded, report = load(data, french.encode("latin-1"), encoding="latin-1")
    assert answers(loaded)[0] == "À l'école française"
    with pytest.raises(UserError, match="--encoding utf-16-le"):
        load(data, french.encode("utf-16-le"))
    assert len(load(data, french.encode("utf-16-le"), encoding="utf-16-le")[0]) == 6


HOSTILE = {
    '{"instruction": "a", "output": "b\\u0000"}': "a NUL character in the text",
    '{"instruction": "a", "output": "\\ud83d"}': "half of a surrogate pair in the text",
    '{"instruction": "a", "output": 1e400}': "the number 1e400 is too large",
    '{"instruction": "a", "output": NaN}': "NaN is not a JSON number",
    '{"instruction": "a", "output": "b", "output": "c"}': "the key 'output' appears twice",
    '{"instruction": "a", "output": %s}' % ("7" * 5000): "the number 7777777777... is too large",  # noqa: UP031
}


def test_fault_24_nul_surrogate_numbers_doubled_keys(tmp_path):
    """Each is an error of its own row, named with its line; the rows around it are kept as they are."""
    lines = [line for pair in zip(LINES, HOSTILE, strict=True) for line in pair]
    loaded, report = load(tmp_path / "d.jsonl", "\n".join(lines))
    assert answers(loaded) == [row["output"] for row in ROWS]
    named = [f"d.jsonl:{2 * number} {reason}" for number, reason in enumerate(HOSTILE.values(), 1)]
    assert report.skipped_examples == named
    # The same through readers that have no escapes of their own.
    for name, text in (("d.csv", "question,answer\nwhat,that\nc,\0\n"), ("d.txt", "what?\nthat.\n\nc\nd\0\n")):
        assert load(tmp_path / name, text)[1].skipped_examples == [f"{name}:{3 + name.endswith('txt')} {HOSTILE_NUL}"]


HOSTILE_NUL = "a NUL character in the text"


def test_fault_25_type_changes(tmp_path):
    """A list, an object, a truth value, null or nothing is an error of its row; a number is taken as its digits."""
    values = {"[1]": "a list", '{"a": 1}': "a dict", "true": "a bool", "null": "missing"}
    lines = [f'{{"instruction": "a", "output": {value}}}' for value in values] + ['{"instruction": "a"}']
    loaded, report = load(tmp_path / "d.jsonl", "\n".join([*LINES, *lines]))
    assert len(loaded) == 6
    for number, (line, what) in enumerate(zip(report.skipped_examples, [*values.values(), "missing"], strict=True), 7):
        assert line.startswith(f"d.jsonl:{number} output is {what}")
    numbers = ['{"instruction": "6 x 7?", "output": 42}', '{"instruction": "1/4?", "output": 0.25}']
    assert answers(load(tmp_path / "e.jsonl", "\n".join(numbers))[0]) == ["42", "0.25"]


def test_fault_26_huge_row_deep_nesting_empty_file(tmp_path, random_model_dir):
    """Row errors in bounded memory; an empty file is refused."""
    data = tmp_path / "d.jsonl"
    huge = json.dumps({"instruction": "a", "output": "长" * 7_000_000}, ensure_ascii=False)
    deep = f'{{"instruction": "a", "output": {"[" * 2000}{"]" * 2000}}}'
    content = "\n".join([LINES[0], huge, LINES[1], deep, LINES[2]]).encode()
    assert len(content) > 20_000_000
    tracemalloc.start()
    loaded, report = load(data, content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(loaded) == 3
    assert report.skipped_examples[0] == "d.jsonl:2 more than 1,000,000 characters"
    assert report.skipped_examples[1] in ("d.jsonl:4 nested too deeply", "d.jsonl:4 output is a list, not text")
    assert peak < 8 * len(content)
    for empty in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        data.write_bytes(empty)
        assert f"{data} is empty" in sft(random_model_dir, data, code=1).err
