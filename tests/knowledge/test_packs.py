"""The packs that come with the package: size, content, and each rule on its own examples."""

import pytest

from unsloth_factory.knowledge import TermNormalizer, available_packs, load_pack
from unsloth_factory.scoring import failed_examples, rule_violations

SMALLEST = {"medical": (65, 45, 18), "legal": (28, 22, 9), "psychology": (28, 22, 9), "exam": (28, 22, 9)}


def test_the_four_packs_are_there() -> None:
    assert available_packs() == sorted(SMALLEST)


@pytest.mark.parametrize("name", SMALLEST)
def test_packs_are_large_enough(name: str) -> None:
    pack = load_pack(name)
    assert pack.name == name
    assert pack.language == "zh"
    assert len(pack.system_prompt) > 100
    terms, associations, rules = SMALLEST[name]
    assert len(pack.terms) >= terms
    assert len(pack.associations) >= associations
    assert len(pack.rules) >= rules
    assert all(term.variants and term.english for term in pack.terms)
    assert {rule.severity for rule in pack.rules} >= {"critical", "major"}


@pytest.mark.parametrize("name", SMALLEST)
def test_every_rule_catches_its_violations_and_passes_its_harmless_answers(name: str) -> None:
    assert failed_examples(load_pack(name)) == []


@pytest.mark.parametrize("name", SMALLEST)
def test_harmless_answers_of_one_rule_break_no_other(name: str) -> None:
    pack = load_pack(name)
    for rule in pack.rules:
        for example in rule.allows:
            assert rule_violations(example.answer, pack, example.question) == [], example


@pytest.mark.parametrize("name", SMALLEST)
def test_every_variant_becomes_its_canonical_form(name: str) -> None:
    pack = load_pack(name)
    normalizer = TermNormalizer(pack)
    for term in pack.terms:
        for variant in term.variants:
            assert normalizer.normalize(f"关于“{variant}”。") == (f"关于“{term.canonical}”。", 1)
        assert normalizer.normalize(term.canonical) == (term.canonical, 0)


@pytest.mark.parametrize("name", SMALLEST)
def test_texts_of_a_pack_itself_use_canonical_terms(name: str) -> None:
    pack = load_pack(name)
    normalizer = TermNormalizer(pack)
    conditions = [association.condition for association in pack.associations]
    variants = {variant for term in pack.terms for variant in term.variants}
    assert not variants & set(conditions)
    for word in pack.protected_words:
        assert normalizer.normalize(word) == (word, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("急性心梗不是普通心梗", "急性心肌梗死不是普通心肌梗死"),
        ("属于中风险人群，曾中风", "属于中风险人群，曾脑卒中"),
        ("他在MIT学习，病情mild，患有MI", "他在MIT学习，病情mild，患有心肌梗死"),
        ("做了b超检查和B超", "做了超声检查和超声检查"),
        ("接种流感疫苗预防流感", "接种流感疫苗预防流行性感冒"),
        ("心源性哮喘与哮喘", "心源性哮喘与支气管哮喘"),
        ("孩子吃了Ibuprofen", "孩子吃了布洛芬"),
    ],
)
def test_medical_sentences(text: str, expected: str) -> None:
    assert TermNormalizer(load_pack("medical")).normalize(text)[0] == expected
