"""The letter that a free answer chooses: what models write, and what must not be taken for a choice."""

from __future__ import annotations

import pytest

from unsloth_factory.evaluation.choice.letters import chosen_letter

OPTIONS = ("高盐饮食", "低盐饮食", "多喝酒", "熬夜")
ANSWERS = [
    # named as the answer
    ("答案：B", "B"),
    ("答案是B", "B"),
    ("答案是 B。", "B"),
    ("答案为【C】", "C"),
    ("答案：Ｂ", "B"),
    ("答案是“D”", "D"),
    ("答案是：\n\nB", "B"),
    ("【答案】B", "B"),
    ("【答案】B\n【解析】A项正确，但……", "B"),
    ("答：B", "B"),
    ("所以是B", "B"),
    ("The answer is probably B", "B"),
    ("Correct: B", "B"),
    ("B is incorrect. C is incorrect. So A.", "A"),
    ("Therefore, C.", "C"),
    ("B选项正确，A选项也正确", None),
    ("A is correct and B is correct", None),
    ("B对，其他错", "B"),
    ("neither A nor B", None),
    ("答案并非A而是C", "C"),
    ("故答案为：B.", "B"),
    ("c) drink", "C"),
    ("**答案：B. 低盐饮食**", "B"),
    ("正确答案是：(C) 多喝酒", "C"),
    ("本题答案应该是 D，因为熬夜伤身。", "D"),
    ("答案可能是C", "C"),
    ("答案应选A", "A"),
    ("综上，本题应选 D。", "D"),
    ("A项错误，B项错误，D项错误，故选C。", "C"),
    ("故本题选B，A、C、D均错误。", "B"),
    ("因此选择 (D)", "D"),
    ("The answer is **D**", "D"),
    ("The correct answer is (B).", "B"),
    ("the answer is b.", "B"),
    ("Answer: C", "C"),
    ("ANSWER: C", "C"),
    ("Answer: A. Because B and C are wrong.", "A"),
    ("Answer: A, because B is wrong and so is C", "A"),
    ("The correct option is C, not D.", "C"),
    ("The answer to this question is option D.", "D"),
    ("The answer is not A, it is B.", "B"),
    ("So the final answer would be: C.", "C"),
    (r"Therefore $\boxed{A}$", "A"),
    (r"答案是 \boxed{\text{B}}。", "B"),
    (r"I first thought \boxed{A}, but \boxed{D}", "D"),
    (r"\boxed{B. 低盐饮食}", "B"),
    (r"\boxed{低盐饮食}", "B"),
    (r"\boxed{vitamin D}", None),
    ("`C`", "C"),
    # corrected: the last one counts
    ("答案是A。不对，再想想，答案是B。", "B"),
    ("答案不是A，而是B", "B"),
    ("答案是A还是B？我认为答案是B。", "B"),
    ("答案是C。如果选A就错了。", "C"),
    ("The answer is A. Wait, no: the answer is C.", "C"),
    # chosen
    ("我选 (C)", "C"),
    ("选B", "B"),
    ("选择D选项", "D"),
    ("不选A，选B", "B"),
    ("I would choose B.", "B"),
    ("I'd go with option C", "C"),
    # called right
    ("B项正确，其余都不对。", "B"),
    ("A不正确，B正确", "B"),
    ("Option C is the correct choice.", "C"),
    ("D is the answer.", "D"),
    ("只有C符合题意", "C"),
    ("A选项错误，B选项错误，C选项错误，所以只能是D", "D"),
    # a line of it, or its line
    ("B", "B"),
    ("b", "B"),
    ("(B)", "B"),
    ("Ｂ．", "B"),
    ("B. 低盐饮食", "B"),
    ("B、低盐饮食。高血压患者应少吃盐。", "B"),
    ("A 和 C 都有道理。\n\nD", "D"),
    ("**B**\n\n解析：盐多伤身，缺乏维生素D也有害。", "B"),
    # spoken of, or its text
    ("低盐饮食", "B"),
    ("答案是低盐饮食。", "B"),
    ("我认为是选项 C。", "C"),
    ("It has to be (D), I think", "D"),
    # no choice
    ("", None),
    ("我无法回答这个问题。", None),
    ("As an AI, I cannot give medical advice.", None),
    ("A good question! I do not know.", None),
    ("The answer is a bit unclear.", None),
    ("The answer is A good diet.", None),
    ("缺乏维生素D会怎样？请咨询医生。", None),
    ("Hepatitis B and vitamin C are unrelated.", None),
    ("以上都不对", None),
    ("None of the above", None),
    ("答案：略", None),
    ("答案是E", None),
    ("答案是A吗？我不确定。", None),
    # several
    ("ABD", None),
    ("A、B都可以", None),
    ("A, B, C", None),
    ("A.C.D", None),
    ("A. B超检查", "A"),
    ("B，低盐为好", "B"),
    ("答案：AB", None),
    ("答案是A、C", None),
    ("答案是A和C。", None),
    ("答案是A或B", None),
    ("The answer is A and C.", None),
    ("Answer: A, C", None),
    ("Answer: A/B", None),
    ("选A、B、D", None),
    ("A和B正确", None),
    ("A. 高盐饮食\nB. 低盐饮食\nC. 多喝酒\nD. 熬夜", None),
    ("A\nB\nC\nD", None),
    ("排除A、B、C。", None),
    (r"\boxed{A, B}", None),
    ("A, but maybe B", None),
    ("A，也可能是B。", None),
    ("答案是A，也可能是B", None),
    ("The answer is A, although it could also be C.", None),
    ("A. It might be B if the patient were older.", "A"),
    ("A，可能B型超声更好", "A"),
    ("A, because B may be harmful", "A"),
    ("答案是A。B也可能有效，但不是首选。", "A"),
    ("A, but maybe B. The answer is B.", "B"),
    ("也可能是A，但答案是B。", "B"),
    ("答案不是A", None),
    ("A选项错误。", None),
    ("The answer is not B.", None),
]


@pytest.mark.parametrize(("text", "letter"), ANSWERS, ids=range(len(ANSWERS)))
def test_what_an_answer_chooses(text, letter):
    assert chosen_letter(text, "ABCD", OPTIONS) == letter


def test_letters_beyond_d_and_options_that_are_equal():
    assert chosen_letter("答案是E", "ABCDE") == "E"
    assert chosen_letter("同", "AB", ("同", "同")) is None
    assert chosen_letter("是", "AB", ("是", "否")) == "A"


def test_a_long_answer_is_read_quickly():
    import time

    start = time.perf_counter()
    for text in (
        "答案" * 20000,
        "A、" * 20000,
        "选" + " " * 20000,
        "(((" * 20000,
        "the answer " * 20000,
        "\\boxed{" * 9000,
    ):
        chosen_letter(text)
    assert time.perf_counter() - start < 5
