"""Every shape to turns, every wrong row to a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.formats import SHAPES, Parsed, RowProblem, Tags, find_shape, named_shape
from unsloth_factory.data.types import Turn

Q, A = Turn("user", "q"), Turn("assistant", "a")
FILE = Path("d.json")


def parse(row: dict, tags: Tags | None = None) -> Parsed:
    lower = {key.lower(): value for key, value in row.items()}
    return find_shape(list(row), FILE).parse(lower, tags or Tags())


@pytest.mark.parametrize(
    ("row", "shape", "turns"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, "alpaca", (Q, A)),
        ({"instruction": "q", "input": None, "output": " a\n"}, "alpaca", (Q, A)),
        ({"instruction": "do", "input": "this", "output": "a"}, "alpaca", (Turn("user", "do\nthis"), A)),
        ({"instruction": "q", "output": 42}, "alpaca", (Q, Turn("assistant", "42"))),
        ({"instruction": "q", "output": 0.5}, "alpaca", (Q, Turn("assistant", "0.5"))),
        ({"instruction": "q", "output": "a", "system": "s"}, "alpaca", (Turn("system", "s"), Q, A)),
        (
            {"instruction": "q", "output": "a", "history": [["q0", "a0"]]},
            "alpaca",
            (Turn("user", "q0"), Turn("assistant", "a0"), Q, A),
        ),
        (
            {"instruction": "q", "output": "a", "history": [{"user": "q0", "assistant": "a0"}]},
            "alpaca",
            (Turn("user", "q0"), Turn("assistant", "a0"), Q, A),
        ),
        (
            {
                "instruction": "q",
                "output": "a",
                "history": [{"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"}],
            },
            "alpaca",
            (Turn("user", "q0"), Turn("assistant", "a0"), Q, A),
        ),
        ({"instruction": "q", "output": "a", "history": None}, "alpaca", (Q, A)),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", (Q, A)),
        ({"dialogue": [{"role": "client", "content": "q"}, {"role": "counselor", "content": "a"}]}, "sharegpt", (Q, A)),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages", (Q, A)),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": "a", "reasoning_content": "r"},
                ]
            },
            "messages",
            (Turn("system", "s"), Q, Turn("assistant", "a", "r")),
        ),
        ({"question": "q", "answer": "a"}, "qa", (Q, A)),
        ({"prompt": "q", "response": "a"}, "qa", (Q, A)),
        ({"prompt": "q", "completion": "a"}, "qa", (Q, A)),
        ({"query": "q", "response": "a"}, "qa", (Q, A)),
        ({"input": "q", "output": "a", "id": 1}, "qa", (Q, A)),
        ({"instruction": "q", "response": "a"}, "qa", (Q, A)),
        ({"问题": "q", "回答": "a"}, "qa", (Q, A)),
        ({"Question": "q", "Complex_CoT": "r", "Response": "a"}, "qa", (Q, Turn("assistant", "a", "r"))),
        ({"department": "d", "title": "t", "ask": "q", "answer": "a"}, "qa", (Turn("user", "t\nq"), A)),
        ({"title": "q", "ask": "so: q?", "answer": "a"}, "qa", (Turn("user", "so: q?"), A)),
        ({"title": "q", "ask": "", "answer": "a"}, "qa", (Q, A)),
        ({"question": "q", "answer": "<think>\nr\n</think>\n\na"}, "qa", (Q, Turn("assistant", "a", "r"))),
        ({"question": "q", "answer": "<think>\n\n</think>\n\na"}, "qa", (Q, A)),
        ({"question": "q", "answer": "so <think> is"}, "qa", (Q, Turn("assistant", "so <think> is"))),
    ],
)
def test_turns(row, shape, turns):
    assert find_shape(list(row), FILE).name == shape
    assert parse(row).turns == turns


def messages(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": f"{role}{i}"} for i, role in enumerate(roles)]}


def test_turns_of_one_role_are_joined():
    parsed = parse(messages("user", "user", "assistant", "assistant", "user", "assistant"))
    assert [turn.content for turn in parsed.turns] == [
        "user0\n\nuser1",
        "assistant2\n\nassistant3",
        "user4",
        "assistant5",
    ]
    assert parsed.merged == 2


def test_unanswered_end_is_dropped_and_tools_are_kept():
    assert [turn.role for turn in parse(messages("user", "assistant", "user")).turns] == ["user", "assistant"]
    roles = [turn.role for turn in parse(messages("user", "assistant", "tool", "assistant")).turns]
    assert roles == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "", "input": " ", "output": "a"}, "empty question"),
        ({"question": "q", "answer": " \n"}, "empty answer"),
        ({"question": "q", "answer": "<think>r</think> "}, "empty answer"),
        ({"question": "q", "answer": "<think>r"}, "<think> without </think>"),
        ({"question": "q", "answer": None}, "answer is missing"),
        ({"question": "q", "answer": float("nan")}, "answer is missing"),
        ({"question": "q", "answer": ["a"]}, "answer is a list"),
        ({"question": "q", "answer": {"a": 1}}, "answer is a dict"),
        ({"question": "q", "answer": True}, "answer is a bool"),
        ({"question": ["q"], "answer": "a"}, "question is a list"),
        ({"instruction": "q", "output": "a", "history": [["q0"]]}, "pairs of question and answer"),
        ({"instruction": "q", "output": "a", "history": "x"}, "history is not a list"),
        (messages("user"), "no assistant turn"),
        (messages("assistant", "user", "assistant"), "the first turn is the assistant's"),
        (messages("system", "system", "user", "assistant"), "a system turn that is not the first"),
        (messages("user", "system", "assistant"), "a system turn that is not the first"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": "text"}, "not a list of messages"),
        ({"messages": ["text"]}, "holds a str"),
        (messages("user", "narrator"), "unknown role 'narrator'"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "unknown role"),
        ({"messages": [{"role": "user"}]}, "without text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "something other than text"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "tool calls"),
        ({"messages": [{"role": "user", "content": "q"}], "images": ["1.jpg"]}, "images need"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen equals rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is missing"),
        ({"chosen": [{"role": "user", "content": "q"}], "rejected": "a"}, "does not end with the assistant's"),
    ],
)
def test_problems(row, reason):
    with pytest.raises(RowProblem, match=reason):
        parse(row)


GPT = {"from": "gpt", "value": "a"}
FULL = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
WORSE = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": GPT, "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"question": "q", "response_chosen": "a", "response_rejected": "b"},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {"chosen": FULL, "rejected": WORSE},
        {"prompt": "q", "chosen": FULL, "rejected": WORSE},
        {"prompt": FULL[:1], "chosen": FULL[1:], "rejected": WORSE[1:]},
    ],
)
def test_preferences(row):
    assert find_shape(list(row), FILE).preference
    parsed = parse(row)
    assert (parsed.turns, parsed.chosen, parsed.rejected) == ((Q,), A, Turn("assistant", "b"))


def test_answers_to_different_prompts():
    other = [{"role": "user", "content": "other"}, *WORSE[1:]]
    with pytest.raises(RowProblem, match="different prompts"):
        parse({"chosen": FULL, "rejected": other})


def test_own_tags():
    row = {"conversations": [{"wer": "frager", "was": "q"}, {"wer": "antworter", "was": "a"}]}
    tags = Tags("wer", "was", {"frager": "user", "antworter": "assistant"})
    assert parse(row, tags).turns == (Q, A)


def test_unknown_shapes():
    with pytest.raises(UserError, match=r"d\.json: the columns x, outptu .*'outptu' meant to be 'output'.*--columns"):
        find_shape(["x", "outptu"], FILE)
    with pytest.raises(UserError, match=r"alpca: unknown\. Known: auto, .*Did you mean alpaca"):
        named_shape("alpca")
    assert {shape.name for shape in SHAPES} == {"alpaca", "sharegpt", "messages", "qa", "preference"}
