"""Streaming: whole characters, stop tokens, and thinking told apart exactly once."""

from __future__ import annotations

import pytest

from unsloth_factory.inference.stream import StreamEvent, TextAssembler, ThinkingSplitter, decoder_of, events


def byte_decode(ids: list[int]) -> str:
    """A byte-level decoder: one token a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def run(splitter: ThinkingSplitter, pieces) -> list[tuple[str, str]]:
    found = [event for piece in pieces for event in splitter.push(piece)] + list(splitter.finish())
    merged: list[list[str]] = []
    for kind, text in found:
        if merged and merged[-1][0] == kind:
            merged[-1][1] += text
        else:
            merged.append([kind, text])
    return [(kind, text) for kind, text in merged]


def test_a_character_comes_whole_when_its_last_byte_has_come():
    assembler = TextAssembler(byte_decode)
    assert [assembler.push(byte) for byte in "高a压😀".encode()] == ["", "", "高", "a", "", "", "压", "", "", "", "😀"]
    assert assembler.finish() == ""


def test_bytes_that_never_become_a_character_are_shown_once():
    assembler = TextAssembler(byte_decode)
    pieces = [assembler.push(byte) for byte in b"a\xe9\xab"] + [assembler.finish()]
    assert "".join(pieces) == "a\ufffd"
    assembler = TextAssembler(byte_decode)
    pieces = [assembler.push(byte) for byte in b"a\xff\xff\xffb"] + [assembler.finish()]
    assert "".join(pieces) == "a\ufffd\ufffd\ufffdb"


def test_a_tokens_context_keeps_the_space_that_its_start_would_lose():
    words = {1: " Hello", 2: " big", 3: " world"}
    assembler = TextAssembler(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [assembler.push(i) for i in (1, 2, 3)] == ["Hello", " big", " world"]


def test_every_split_of_real_text_is_put_together_again(random_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model_dir)
    text = "血压偏高，应低盐饮食。Café 😀 naïve — 龘靐齉"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) // 2
    pieces = [event.text for event in events(ids, decoder_of(tokenizer))]
    assert "".join(pieces) == text
    assert len(pieces) > 10
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\n想一想。\n</think>\n\n答案。", [("thinking", "想一想。"), ("answer", "答案。")]),
        ("<think>\n\n</think>\n\n答案。", [("answer", "答案。")]),
        ("直接回答", [("answer", "直接回答")]),
        ("答案里有 <think> 字样", [("answer", "答案里有 <think> 字样")]),
        ("<think>a</think>b<think>c</think>d", [("thinking", "a"), ("answer", "b<think>c</think>d")]),
        ("<think>\n1 < 2\n\n</ not closed", [("thinking", "1 < 2\n\n</ not closed")]),
        ("<thin", [("answer", "<thin")]),
        ("  \n", []),
        ("<think>x</think>", [("thinking", "x")]),
    ],
)
def test_thinking_and_answer_come_once_however_the_text_is_cut(text, expected, size):
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    assert run(ThinkingSplitter(), pieces) == expected


def test_a_prompt_that_opened_thinking():
    assert run(ThinkingSplitter(thinking_open=True), ["想", "</thi", "nk>\n", "\n答"]) == [
        ("thinking", "想"),
        ("answer", "答"),
    ]


def test_text_is_not_held_back_longer_than_needed():
    splitter = ThinkingSplitter()
    assert list(splitter.push("好")) == [StreamEvent("answer", "好")]
    splitter = ThinkingSplitter()
    assert list(splitter.push("<think>\n想")) == [StreamEvent("thinking", "想")]
