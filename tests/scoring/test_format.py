"""Forms that go wrong: repeated phrases, broken thinking, the wrong language."""

from __future__ import annotations

import pytest

from unsloth_factory.scoring.format import language_of, language_switch, repeated_ngram, thinking_state


def test_a_phrase_that_comes_back_between_other_words():
    phrase = "高血压患者应当坚持低盐饮食"
    fillers = ["一是少吃咸菜。", "二是多走路。", "三是早睡觉。", "四是少喝酒。"]
    assert repeated_ngram("".join(phrase + "，" + filler for filler in fillers)) == phrase[:10]
    assert repeated_ngram("".join(phrase + "，" + filler for filler in fillers[:3])) is None
    words = "take one tablet of aspirin every morning with some water"
    assert repeated_ngram(f"{words}, then rest. " * 4) is not None
    assert repeated_ngram(words * 3) is None
    assert repeated_ngram("哈" * 30) is None  # overlapping: 3 times 10
    assert repeated_ngram("哈" * 40) is not None
    assert repeated_ngram("") is None


@pytest.mark.parametrize(
    ("answer", "reasoning", "thinking", "state"),
    [
        ("好", "想", True, "fine"),
        ("好", None, False, "fine"),
        ("好", None, None, "fine"),
        ("好", None, True, "missing"),
        ("好", "  ", True, "missing"),
        ("", "想", True, "no answer after it"),
        ("好</think>", "想", True, "stray tags"),
        ("<think>好", None, None, "stray tags"),
        ("好", "想<think>又想", True, "stray tags"),
    ],
)
def test_thinking(answer, reasoning, thinking, state):
    assert thinking_state(answer, reasoning, thinking) == state


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("低盐饮食，按时服药。", "Chinese"),
        ("Take it daily with water.", "Latin"),
        ("お大事になさってください", "Japanese"),
        ("약을 드시고 푹 쉬세요 오늘", "Korean"),
        ("Принимайте это лекарство каждый день", "Cyrillic"),
        ("做CT、MRI和HbA1c检查", "Chinese"),
        ("CT MRI HbA1c 100mg", None),
        ("好的", None),
        ("", None),
    ],
)
def test_languages(text, language):
    assert language_of(text) == language


@pytest.mark.parametrize(
    ("answer", "reference", "switch"),
    [
        ("You should eat less salt.", "应低盐饮食。", "Latin instead of Chinese"),
        ("应低盐饮食，少吃咸菜。", "You should eat less salt.", "Chinese instead of Latin"),
        ("应低盐饮食。You should also take the medicine daily. 多运动。", "应低盐饮食。", "Latin within Chinese"),
        ("应低盐饮食，口服阿司匹林(aspirin)100mg。", "应低盐饮食。", None),
        ("选B。", "应低盐饮食。", None),
        ("应低盐饮食。You should take the medicine daily.", "少盐少油。Take the medicine every day.", None),
        ("结果：print(a, b, c) 即可得到答案", "打印即可得到", None),
    ],
)
def test_language_switches(answer, reference, switch):
    assert language_switch(answer, reference) == switch
