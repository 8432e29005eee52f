"""Every file kind, every encoding, every way in which a file can be broken."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.readers import read_table

ROWS = [
    {"question": "高血压患者能吃党参吗？", "answer": "可以口服党参的。"},
    {"question": "糖尿病会进行遗传吗？", "answer": '有"隔代"遗传，请注意。'},
]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(tmp_path, name: str, content: str | bytes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def values(table) -> list:
    return [row.values for row in table.rows]


def csv_text(delimiter: str = ",", end: str = "\n") -> str:
    import io

    out = io.StringIO()
    writer = csv.DictWriter(out, ["question", "answer"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("a.jsonl", JSONL, "jsonl"),
        ("a.json", JSONL, "jsonl"),
        ("a.json", json.dumps(ROWS, ensure_ascii=False, indent=2), "json"),
        ("a.jsonl", json.dumps(ROWS), "json"),
        ("a.json", json.dumps({"data": ROWS}, indent=1), "json"),
        ("a.json", json.dumps({"train": ROWS}), "json"),
        ("a.json", "\n".join(json.dumps(row, indent=2) for row in ROWS), "json"),
        ("a.csv", csv_text(), "csv"),
        ("a.csv", csv_text(";"), "csv"),
        ("a.csv", csv_text("\t"), "csv"),
        ("a.csv", csv_text(end="\r\n"), "csv"),
        ("a.tsv", csv_text("\t"), "tsv"),
        ("a.txt", "\n\n".join(row["question"] + "\r\n" + row["answer"] + "\n" for row in ROWS), "txt"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16", "utf-32"])
def test_text_files_in_every_encoding(tmp_path, name, content, kind, encoding):
    table = read_table(write(tmp_path, name, content.encode(encoding)))
    assert values(table) == ROWS
    assert table.kind == kind
    ascii_only = content.isascii() and not encoding.startswith(("utf-8-sig", "utf-16", "utf-32"))
    assert table.encoding == ("utf-8" if ascii_only else encoding.replace("gb18030", "gbk"))


def test_gb18030_where_gbk_is_not_enough(tmp_path):
    table = read_table(write(tmp_path, "a.csv", (csv_text() + "表情,很好\U0001f600\n").encode("gb18030")))
    assert table.encoding == "gb18030"
    assert table.rows[2].values["answer"] == "很好\U0001f600"


FRENCH = "question,answer\nL'été dernier à l'école,Le café où étudiait l'élève était fermé à Noël\n" * 20
BIG5 = "question,answer\n請問高血壓患者平時需要注意什麼,應該低鹽飲食並且按時服藥定期測量血壓\n" * 20


@pytest.mark.parametrize(
    ("text", "encoding", "offered"), [(FRENCH, "latin-1", "cp1252"), (BIG5, "big5", "big5")], ids=["French", "Big5"]
)
def test_a_guessed_encoding_is_offered_and_not_taken(tmp_path, text, encoding, offered):
    path = write(tmp_path, "a.csv", text.encode(encoding))
    with pytest.raises(UserError, match=f"line 2: .*may be {offered}, which reads .*--encoding {offered}"):
        read_table(path)
    assert read_table(path, offered).rows[0].values["question"] == text.split("\n")[1].split(",")[0]


def test_damaged_bytes_are_told_from_another_encoding(tmp_path):
    for name, encoding in (("utf-8", "utf-8"), ("gb18030", "gbk")):
        lines = [line.encode(encoding) for line in (csv_text() * 20).split("\n")]
        lines[7] = lines[7] + b"\xff\xff"
        with pytest.raises(UserError, match=f"line 8: 2 damaged characters; the rest of the file is {name}"):
            read_table(write(tmp_path, "a.csv", b"\n".join(lines)))


def test_bytes_of_no_encoding(tmp_path):
    path = write(tmp_path, "a.csv", csv_text().encode("gbk"))
    with pytest.raises(UserError, match="line 2: byte 0x.. is not utf-8"):
        read_table(path, "utf-8")
    with pytest.raises(UserError, match="no such encoding"):
        read_table(path, "klingon")
    with pytest.raises(UserError, match="undefined: .* cannot be read so"):
        read_table(path, "undefined")
    with pytest.raises(UserError, match="zero bytes"):
        read_table(write(tmp_path, "b.csv", csv_text().encode("utf-16-le")))


def test_parquet_and_xlsx_whatever_they_are_called(tmp_path):
    import openpyxl
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values(read_table(tmp_path / "a.parquet")) == ROWS
    (tmp_path / "a.json").write_bytes((tmp_path / "a.parquet").read_bytes())
    assert read_table(tmp_path / "a.json").kind == "parquet"
    book = openpyxl.Workbook()
    for cells in (["question", "answer"], *([row["question"], row["answer"]] for row in ROWS), [None, None], ["q", 7]):
        book.active.append(cells)
    book.save(tmp_path / "a.xlsx")
    table = read_table(tmp_path / "a.xlsx")
    assert values(table) == [*ROWS, {"question": "q", "answer": 7}]
    assert [row.number for row in table.rows] == [2, 3, 5]


def test_xlsx_without_openpyxl(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UserError, match=r"pip install unsloth-factory\[excel\]"):
        read_table(write(tmp_path, "a.xlsx", b"PK\x03\x04"))


@pytest.mark.parametrize("name", ["a.parquet", "a.xlsx"])
def test_damaged_binary_files(tmp_path, name):
    with pytest.raises(UserError, match="not a readable"):
        read_table(write(tmp_path, name, b"PK\x03\x04 not really"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.txt", "a.parquet", "a.xlsx"])
@pytest.mark.parametrize("content", [b"", b" \r\n\n", b"\xef\xbb\xbf"])
def test_empty_files(tmp_path, name, content):
    if content and name.endswith(("parquet", "xlsx")):
        content = b""
    with pytest.raises(UserError, match="is empty"):
        read_table(write(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "[]"), ("a.csv", "question,answer\n"), ("a.json", '{"data": []}')]
)
def test_files_without_rows(tmp_path, name, content):
    with pytest.raises(UserError, match="no rows"):
        read_table(write(tmp_path, name, content))


def test_unknown_kinds(tmp_path):
    with pytest.raises(UserError, match=r"\.docx are not read.*\.jsonl"):
        read_table(write(tmp_path, "a.docx", "text"))
    with pytest.raises(UserError, match="running text"):
        read_table(write(tmp_path, "a.txt", "one\ntwo\nthree\n"))


def test_json_lines_keep_their_line_numbers(tmp_path):
    text = '\r\n{"a": "x"}\r\n\r\n{"a": "y\u2028z"}\r\n'
    table = read_table(write(tmp_path, "a.jsonl", text))
    assert [(row.number, row.values) for row in table.rows] == [(2, {"a": "x"}), (4, {"a": "y\u2028z"})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n{"a": 3}\n', r"a\.jsonl: broken JSON in line 2, column 6: Expecting value"),
        ('{"a": 1}\n{"a": "cut o', r"line 2, column 7: Unterminated string"),
        ('{"a": 1}\n{"a": 1} trailing\n', r"line 2, column 9: Extra data"),
        ("x\n" * 9, r"line 1, column 1.*and 6 more lines: 4, 5, 6, 7, 8, 9\)"),
    ],
)
def test_broken_json_lines_refuse_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path, "a.jsonl", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', r"line 2, column 7: broken JSON in row 2: Expecting ':'"),
        ('[{"a": 1}\n {"a": 2}]', r"line 2, column 2: .*row 2: ',' or ']' was expected"),
        ('[{"a": 1},\n', "The file ends there"),
        ('[{"a": 1}] x', "after the end of the array"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_broken_json_arrays_refuse_the_file(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_table(write(tmp_path, "a.json", text))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": 1e400}', "the number 1e400 is too large"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ('{"a": "x\\u0000"}', "NUL character"),
        ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
        ('["a"]', "a JSON object was expected, found list"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    ],
)
def test_bad_rows_are_problems_of_their_row(tmp_path, line, problem):
    good = '{"a": "\\ud83d\\ude00"}'
    table = read_table(write(tmp_path, "a.jsonl", f"{good}\n{line}\n{good}\n"))
    assert [row.values for row in table.rows] == [{"a": "\U0001f600"}, None, {"a": "\U0001f600"}]
    assert problem in table.rows[1].problem
    assert table.rows[1].number == 2
    if "nested" not in problem:
        array = read_table(write(tmp_path, "a.json", f"[{good},\n{line}]"))
        assert problem in array.rows[1].problem


def test_csv_rows_and_lines(tmp_path):
    text = 'question,answer\n"two\nlines",a\n\nb\nc,d,e\n"x"y,z\nlast,"said ""so"""\nn,\0\n'
    table = read_table(write(tmp_path, "a.csv", text))
    assert [row.number for row in table.rows] == [2, 5, 6, 7, 8, 9]
    assert table.rows[0].values == {"question": "two\nlines", "answer": "a"}
    assert table.rows[4].values == {"question": "last", "answer": 'said "so"'}
    problems = [row.problem for row in table.rows if row.problem]
    assert problems[:2] == ["1 fields where the header has 2", "3 fields where the header has 2"]
    assert problems[2].startswith("broken csv")
    assert "NUL" in problems[3]


def test_csv_faults_of_the_whole_file(tmp_path):
    with pytest.raises(UserError, match="line 3: the quote opened in this row is never closed"):
        read_table(write(tmp_path, "a.csv", 'question,answer\na,b\n"c,d\ne,f\n'))
    with pytest.raises(UserError, match="column answer twice"):
        read_table(write(tmp_path, "b.csv", "answer,answer\na,b\n"))


def test_a_very_long_field_is_read(tmp_path):
    before = csv.field_size_limit()
    table = read_table(write(tmp_path, "a.csv", "question,answer\nq," + "长" * 1_000_000 + "\n"))
    assert len(table.rows[0].values["answer"]) == 1_000_000
    assert csv.field_size_limit() == before


def test_txt_blocks(tmp_path):
    table = read_table(write(tmp_path, "a.txt", "\nq1\na1\na1b\n\n\nq2\n\nq3\na3"))
    assert [(row.number, row.values) for row in table.rows] == [
        (2, {"question": "q1", "answer": "a1\na1b"}),
        (7, None),
        (9, {"question": "q3", "answer": "a3"}),
    ]
    assert "without an answer line" in table.rows[1].problem
