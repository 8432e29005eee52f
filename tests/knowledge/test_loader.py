"""One YAML file is a pack; a mistake in it names file, section, entry, field and what is allowed."""

from pathlib import Path

import pytest

from unsloth_factory.knowledge import PackError, load_pack
from unsloth_factory.knowledge.loader import parse_pack

GOOD = """\
name: cooking
title: 烹饪
language: zh
system_prompt: 你是一名厨师。
terms:
  - {canonical: 番茄, variants: [西红柿, tomato], english: tomato}
relations:
  method: [做法, 怎么做]
associations:
  - {condition: 番茄, relation: method, expects: [去皮|剥皮, 切块]}
rules:
  - id: raw_beans
    severity: critical
    description: 四季豆要煮熟。
    forbid: ['生吃(?:四季豆|豆角)']
    violates: [可以生吃四季豆。]
    allows: [不要生吃四季豆。]
"""


def test_one_file_is_a_domain(tmp_path: Path) -> None:
    path = tmp_path / "cooking.yaml"
    path.write_text(GOOD, encoding="utf-8")
    pack = load_pack(path)
    assert (pack.name, pack.title) == ("cooking", "烹饪")
    assert pack.terms[0].variants == ("西红柿", "tomato")
    assert pack.associations[0].expects == ("去皮", "切块")
    assert pack.associations[0].accepts == (("去皮", "剥皮"), ("切块",))
    assert pack.rules[0].allows[0].answer == "不要生吃四季豆。"
    assert load_pack(str(path)) == pack


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("title: 烹饪\n", "", ["field title: missing"]),
        ("title: 烹饪", "titel: 烹饪", ["unknown field 'titel'", "did you mean 'title'", "Allowed: name"]),
        ("title: 烹饪", "title: ''", ["field title: must be text"]),
        ("title: 烹饪", "title: 烹饪\ntitle: 菜", ["line 3", "'title' is given twice"]),
        ("title: 烹饪", "title: !!python/name:os.system x", ["line 2", "could not determine a constructor"]),
        ("name: cooking", "name: [", ["line"]),
        ("variants:", "varients:", ["section terms, entry 1 (番茄)", "unknown field 'varients'", "'variants'"]),
        ("[西红柿, tomato]", "西红柿", ["entry 1 (番茄)", "field variants: must be a list"]),
        ("[西红柿, tomato]", "[西红柿, 西红柿]", ["field variants: '西红柿' is given twice"]),
        ("[西红柿, tomato]", "[茄]", ["field variants: '茄' is one character"]),
        ("[西红柿, tomato]", "[番茄]", ["section terms", "'番茄' belongs to '番茄' and to '番茄'"]),
        ("[西红柿, tomato]", "[120]", ["field variants: must be text, is 120 (put it in quotes)"]),
        ("relation: method", "relation: methd", ["section associations, entry 1 (番茄)", "did you mean 'method'"]),
        ("去皮|剥皮", "去皮|", ["field expects: an empty wording"]),
        ("[去皮|剥皮, 切块]", "[]", ["field expects: must hold at least 1"]),
        ("method: [做法", "Method: [做法", ["section relations", "lower-case"]),
        ("id: raw_beans", "id: Raw Beans", ["section rules, entry 1 (Raw Beans)", "field id", "lower-case"]),
        ("critical", "critcal", ["entry 1 (raw_beans)", "field severity", "did you mean 'critical'", "minor"]),
        ("'生吃(?:四季豆|豆角)'", "'生吃('", ["entry 1 (raw_beans)", "field forbid: bad regular expression '生吃('"]),
        ("'生吃(?:四季豆|豆角)'", "'x*'", ["field forbid", "matches the empty text"]),
        ("    forbid: [", "    require: [", ["field when: missing"]),
        ("    forbid: ['生吃(?:四季豆|豆角)']\n", "", ["exactly one of the fields forbid and require"]),
        ("violates: [可以生吃四季豆。]", "violates: []", ["field violates: must be a list of at least one"]),
        ("[可以生吃四季豆。]", "[{answer: 生吃, qestion: x}]", ["unknown field 'qestion'", "question"]),
        ("rules:\n", "rules: 3\nrulez:\n", ["unknown field 'rulez'", "did you mean 'rules'"]),
    ],
)
def test_mistakes_are_named(old: str, new: str, parts: list[str]) -> None:
    assert old in GOOD
    with pytest.raises(PackError) as caught:
        parse_pack(GOOD.replace(old, new, 1), "my/cooking.yaml")
    message = str(caught.value)
    assert message.startswith("my/cooking.yaml")
    for part in parts:
        assert part in message


RULE = "  - {id: raw_beans, severity: minor, description: x, forbid: [y], violates: [y], allows: [n]}\n"
TERM = "{canonical: 番茄, variants: [西红柿, tomato], english: tomato}"
ASSOCIATION = "  - {condition: 番茄, relation: method, expects: [洗净]}\n"


@pytest.mark.parametrize(
    ("section", "extra", "part"),
    [
        ("rules:\n", RULE, "'raw_beans' is given twice"),
        ("terms:\n", "  - {canonical: 洋柿子, variants: [Tomato]}\n", "'tomato' belongs to '洋柿子' and to '番茄'"),
        ("associations:\n", ASSOCIATION, "'番茄 / method' is given twice"),
    ],
)
def test_duplicates_across_entries(section: str, extra: str, part: str) -> None:
    with pytest.raises(PackError, match=part):
        parse_pack(GOOD.replace(section, section + extra), "f.yaml")


def test_sections_of_a_wrong_kind() -> None:
    with pytest.raises(PackError, match="must be a mapping with the sections"):
        parse_pack("- 1", "f.yaml")
    with pytest.raises(PackError, match="section terms: must be a list, is str"):
        parse_pack(GOOD.replace(f"terms:\n  - {TERM}", "terms: x"), "f.yaml")
    with pytest.raises(PackError, match="section terms, entry 1: must be a mapping"):
        parse_pack(GOOD.replace(TERM, "番茄"), "f.yaml")


def test_unknown_names_and_files(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"'medcal' \(did you mean 'medical'\?\).*exam, legal, medical, psychology"):
        load_pack("medcal")
    with pytest.raises(PackError, match="no such file"):
        load_pack(tmp_path / "none.yaml")
    binary = tmp_path / "gbk.yaml"
    binary.write_bytes("name: 烹饪".encode("gbk"))
    with pytest.raises(PackError, match="not UTF-8"):
        load_pack(binary)
    assert issubclass(PackError, ValueError)
