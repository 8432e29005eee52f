"""JSON answers: 300 and more nasty ones from wrappers x bodies x damages, each with its known outcome."""

from __future__ import annotations

import itertools
import json

import pytest

from unsloth_factory.scoring.json_answers import compare_fields, extract_json, reference_object

BODIES = [
    {"病名": "高血压", "等级": 2},
    {"drug": "aspirin", "dose_mg": 100.5, "daily": True, "note": None},
    {"症状": ["头晕", "胸闷：夜间加重"], "检查": {"血压": "150/95", "心电图": "正常"}},
    {"text": 'He said "stop", then {left}.', "tricky": "a, b: c] }"},
    {"it's": "don't", "路径": "C:\\temp", "换行": "一\n二"},
    {"空": "", "list": [], "object": {}, "n": -1.5e3},
]
WRAPPERS = {
    "bare": "{}",
    "spaces": "\n\n  {}  \n",
    "fenced": "```json\n{}\n```",
    "fenced, no tag": "```\n{}\n```",
    "tildes": "~~~json\n{}\n~~~",
    "upper tag in prose": "好的，结果如下：\n```JSON\n{}\n```\n希望对您有帮助！",
    "fence not closed": "Here it is:\n```json\n{}",
    "prose around": "根据描述，提取结果为 {} ，请核对。",
    "braces around": "集合 {{x}} 与 {{1, 2}} 无关。答案：{}。以上 {{}} 为空。",
    "an earlier draft": '先试 {{"draft": 1}}，再改为 {}',
}
# name -> (what is done to the JSON text, for which bodies it has one reading)
EVERY = frozenset(range(len(BODIES)))
DAMAGES = {
    "none": (lambda body: dumps(body), EVERY),
    "indented": (lambda body: json.dumps(body, ensure_ascii=False, indent=2), EVERY),
    "escaped": (lambda body: json.dumps(body), EVERY),
    "python": (repr, EVERY),
    "trailing comma": (lambda body: dumps(body)[:-1] + ",}", EVERY),
    "full-width outside": (lambda body: full_width(dumps(body)), EVERY),
    "curly quotes": (lambda body: dumps(body).replace('"', "“", 1).replace('"', "”", 1), EVERY),
    "cut off": (lambda body: dumps(body)[:-2].rstrip("}]"), frozenset()),
    "no comma": (lambda body: dumps(body).replace('", "', '" "').replace(', "', ' "'), frozenset()),
    "no quotes": (lambda body: dumps(body).replace('"', ""), frozenset()),
    "NaN": (lambda body: dumps(body)[:-1] + ', "x": NaN}', frozenset()),
    "name twice": (lambda body: dumps(body)[:-1] + ', "x": 1, "x": 2}', frozenset()),
}


def dumps(body) -> str:
    return json.dumps(body, ensure_ascii=False)


def full_width(text: str) -> str:
    """JSON's punctuation outside of strings as a Chinese keyboard types it."""
    out, inside, escaped = [], False, False
    for char in text:
        out.append(char if inside else char.translate(str.maketrans("{}[]:,", "｛｝［］：，")))
        escaped, flips = inside and char == "\\" and not escaped, char == '"' and not (inside and escaped)
        inside ^= flips
    return "".join(out)


CASES = list(itertools.product(WRAPPERS, range(len(BODIES)), DAMAGES))


def test_there_are_300_and_more():
    assert len({nasty(*case) for case in CASES}) >= 300


def nasty(wrapper: str, body: int, damage: str) -> str:
    return WRAPPERS[wrapper].format(DAMAGES[damage][0](BODIES[body]))


@pytest.mark.parametrize(("wrapper", "damage"), itertools.product(WRAPPERS, DAMAGES))
def test_nasty_answers(wrapper, damage):
    for number, body in enumerate(BODIES):
        text = nasty(wrapper, number, damage)
        found = extract_json(text)
        if number in DAMAGES[damage][1]:
            assert found is not None, text
            assert found.value == body, text
            assert found.strict == (damage in ("none", "indented", "escaped")) or damage == "python"
        else:  # nothing, or another object that stands there whole: never a part of the broken one
            assert found is None or found.value == {"draft": 1}, text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{'a': 'it's'}", None),
        ("{'a': 'it\\'s'}", {"a": "it's"}),
        ('{"a": "他说“好”"}', {"a": "他说“好”"}),
        ("{“a”：“x”，“b”：［1，2］}", {"a": "x", "b": [1, 2]}),
        ('{"a": "x",, "b": 1}', None),
        ('{"a": 01}', None),
        ('{"a": 1 "b": 2}', None),
        ('{"a": "x"} {"b": "y"}', {"b": "y"}),
        ('{"a": {"b": 1}, "c": "x', None),
        ('{"a": {"b": 1} "c": 2}', None),
        ("[1, 2]", None),
        ("没有 JSON", None),
        ("", None),
        ("{", None),
        ("{" * 5000, None),
        ('{"a":' * 5000, None),
        ("{'a':" * 5000, None),
        ("{'a':[" + "[" * 5000, None),
        ("```json\n```", None),
        ("{}", {}),
    ],
)
def test_edges(text, expected):
    found = extract_json(text)
    assert (found.value if found else None) == expected


def test_where_it_was_found():
    assert extract_json('{"a": 1}').how == "bare"
    assert extract_json('```\n{"a": 1}\n```').how == "fenced"
    assert extract_json('so {"a": 1}').how == "in prose"
    assert extract_json('{"b": 2}\n```json\n{"a": 1}\n```').value == {"a": 1}


def test_which_references_are_objects():
    assert reference_object(' {"a": 1}\n') == {"a": 1}
    assert reference_object('```json\n{"a": 1}\n```') == {"a": 1}
    assert reference_object('结果 {"a": 1}') is None
    assert reference_object('结果\n```json\n{"a": 1}\n```') is None
    assert reference_object("{'a': 1}") is None
    assert reference_object("{}") is None


def test_fields_by_hand():
    reference = {"病名": "高血压", "等级": 2, "症状": ["头晕", "胸闷"], "检查": {"血压": "150/95"}}
    answer = {"病名": "高血压。", "等级": "2", "症状": ["胸闷", "头晕", "乏力"], "检查": {"血压": "140/95"}, "多余": 1}
    scores = compare_fields(answer, reference)
    assert scores.right == {"病名": True, "等级": True, "症状[]": False, "检查.血压": False}
    assert scores.accuracy == 0.5
    assert scores.precision == pytest.approx(4 / 7)
    assert scores.recall == pytest.approx(4 / 5)
    assert scores.f1 == pytest.approx(2 * (4 / 7) * (4 / 5) / (4 / 7 + 4 / 5))


def test_field_edges():
    assert compare_fields({"a": [2, 1]}, {"a": [1, 2]}).accuracy == 1.0
    assert compare_fields({"a": True}, {"a": 1}).accuracy == 0.0
    assert compare_fields({"a": None}, {"a": ""}).accuracy == 0.0
    assert compare_fields({"a": 3.0}, {"a": 3}).f1 == 1.0
    nothing = compare_fields(None, {"a": 1})
    assert (nothing.accuracy, nothing.f1) == (0.0, 0.0)
    assert compare_fields({"a": {}}, {"a": {}}).f1 == 1.0


@pytest.mark.parametrize("name", ['"a"', "'a'"])
def test_numbers_of_a_model_caught_in_a_loop(name):
    assert extract_json("{" + name + ": " + "9" * 5000 + "}") is None  # more digits than Python reads
    found = extract_json("{" + name + ": " + "9" * 400 + "}")  # more than a float holds
    assert compare_fields(found.value, {"a": 9}).accuracy == 0.0
    assert compare_fields(found.value, found.value).accuracy == 1.0
