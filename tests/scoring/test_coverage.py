"""Terms of the reference and associations of the question's condition."""

import pytest

from unsloth_factory.knowledge import load_pack
from unsloth_factory.scoring import Coverage, asked_associations, association_coverage, term_coverage

MEDICAL = load_pack("medical")


def test_terms_count_in_any_wording() -> None:
    coverage = term_coverage("心梗患者服用Aspirin", "急性心梗？不，心肌梗塞，用阿司匹林", MEDICAL)
    assert coverage == Coverage(("心肌梗死", "阿司匹林"), ("急性心肌梗死",))
    assert coverage.share == pytest.approx(2 / 3)


def test_english_names_count() -> None:
    assert term_coverage("It is Hypertension.", "高血压", MEDICAL).share == 1.0


def test_nothing_expected_has_no_share() -> None:
    assert term_coverage("高血压", "今天天气好", MEDICAL).share is None
    assert association_coverage("今天天气好吗？", "好", MEDICAL).share is None


def test_a_relation_in_the_question_selects_its_words() -> None:
    coverage = association_coverage("高血压有哪些症状？", "头痛、头昏，但没有心慌。", MEDICAL)
    assert coverage == Coverage(("头痛", "头晕"), ("心悸",))


def test_without_a_relation_all_of_the_condition_count() -> None:
    relations = {association.relation for association in asked_associations("介绍一下高血压。", MEDICAL)}
    assert relations == {"symptom", "test", "treatment", "complication"}


def test_the_longest_condition_and_variants_are_found() -> None:
    found = asked_associations("T2DM患者怎么治疗？", MEDICAL)
    assert {association.condition for association in found} == {"2型糖尿病"}


def test_the_answer_may_use_variants_of_expected_words() -> None:
    coverage = association_coverage("房颤的并发症是什么？", "容易引起中风和心衰。", MEDICAL)
    assert coverage == Coverage(("脑卒中", "心力衰竭"), ())


def test_negated_words_count_only_in_warnings() -> None:
    wrong = association_coverage("急性心肌梗死怎么治疗？", "不需要去急诊，也不必用阿司匹林。", MEDICAL)
    assert wrong.found == ()
    right = association_coverage("痛风有什么禁忌？", "不要喝啤酒，不吃海鲜和动物内脏。", MEDICAL)
    assert right.share == 1.0
