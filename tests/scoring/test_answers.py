"""Exact match, leaks, loops and lengths, each against values written by hand."""

import pytest

from unsloth_factory.scoring import (
    LengthStats,
    control_token_leak,
    exact_match,
    length_stats,
    normalize_answer,
    repetition_loop,
    stopped_rate,
)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Ａ", "a"),
        ("A。", "A"),
        ("（A）", "a"),
        ("１２３", "123"),
        ("1,000元", "1000元"),
        ("1,234,567", "1234567"),
        ("你好，世界！", "你好 世界"),
        ("“高血压”", "高血压"),
        ("苹果、香蕉", "苹果,香蕉"),
        ("Hello,  World", "hello world"),
        ("高血压 患者", "高血压患者"),
        ("GPU 显存", "GPU显存"),
        ("x²", "x^2"),
        ("−3", "-3"),
        ("ﬁt", "fit"),
        ("《民法典》", "民法典"),
        ("答案：B", "答案 B"),
        ("line\none", "line one"),
    ],
)
def test_the_same_after_normalisation(answer: str, reference: str) -> None:
    assert exact_match(answer, reference)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("3.5", "35"),
        ("3:1", "31"),
        ("-3", "3"),
        ("1/2", "12"),
        ("10²", "102"),
        ("x+y", "xy"),
        ("hello world", "helloworld"),
        ("A", "B"),
        ("a<b", "ab"),
        ("1,2", "12"),
        ("50%", "50"),
    ],
)
def test_different_in_meaning_stays_different(answer: str, reference: str) -> None:
    assert not exact_match(answer, reference)


def test_normalisation_is_idempotent() -> None:
    for text in ("Ａ。 1,000 x² 3.5 你好， world  foo-bar！", "１，０００。", "…—_"):
        once = normalize_answer(text)
        assert normalize_answer(once) == once


def test_control_tokens() -> None:
    assert control_token_leak("好<|im_end|>\n<|im_start|>user</think>", ["</think>"]) == [
        "<|im_end|>",
        "<|im_start|>",
        "</think>",
    ]
    assert control_token_leak("a < b | c > d, <think> </s>") == []
    assert control_token_leak("[INST] [INST]", ["[INST]"]) == ["[INST]", "[INST]"]
    assert control_token_leak("<｜end▁of▁sentence｜>") == ["<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("好的。" + "多喝水，" * 8, "多喝水，"),
        ("哈" * 30, "哈"),
        ("开头" + "The same line.\n" * 4 + "结尾", "The same line.\n"),
        ("请注意休息，按时服药，定期复查血压，" * 3, None),  # three times is not yet a loop
        ("请注意休息，按时服药，定期复查血压，" * 4, "请注意休息，按时服药，定期复查血压，"),
        ("-" * 200, None),
        ("| --- | --- | --- | --- | --- | --- |", None),
        ("哈哈哈哈", None),
        ("高血压患者应低盐饮食，规律服药，定期测量血压。糖尿病患者应控制饮食，监测血糖。", None),
        ("", None),
    ],
)
def test_repetition_loop(text: str, unit: str | None) -> None:
    found = repetition_loop(text)
    assert (found.unit if found else None) == unit


def test_repetition_counts() -> None:
    found = repetition_loop("x" + "abcdefgh" * 5 + "abcd")
    assert found is not None
    assert found.times == pytest.approx(5.5)


def test_lengths_and_stops() -> None:
    assert length_stats([1, 2, 3, 4, 5, 6, 7, 8, 9, 100]) == LengthStats(10, 14.5, 5.5, 9.0, 1, 100)
    assert length_stats([]) == LengthStats(0, 0.0, 0.0, 0.0, 0, 0)
    assert stopped_rate([True, True, False, True]) == 0.75
    assert stopped_rate([]) == 0.0
