"""Whole tokens only, longest first, idempotent."""

import random

import pytest

from unsloth_factory.knowledge import DomainPack, Term, TermNormalizer, load_pack


def pack_of(terms: dict[str, list[str]], protected: tuple[str, ...] = ()) -> DomainPack:
    return DomainPack(
        name="x",
        title="x",
        language="zh",
        system_prompt="x",
        terms=tuple(Term(canonical, tuple(variants)) for canonical, variants in terms.items()),
        relations=(),
        associations=(),
        rules=(),
        protected_words=protected,
    )


HEART = pack_of(
    {
        "心肌梗死": ["心梗", "心肌梗塞", "MI"],
        "急性心肌梗死": ["急性心梗"],
        "冠心病": ["冠状动脉心脏病"],
        "心脏病": ["heart disease", "心病变"],
        "糖化血红蛋白": ["HbA1x", "糖化"],
    },
    protected=("糖化酶",),
)


@pytest.mark.parametrize(
    ("text", "expected", "count"),
    [
        ("患有心梗。", "患有心肌梗死。", 1),
        ("急性心梗", "急性心肌梗死", 1),
        ("急性心肌梗死", "急性心肌梗死", 0),
        ("心肌梗死", "心肌梗死", 0),
        ("心梗心梗", "心肌梗死心肌梗死", 2),
        ("心梗死", "心梗死", 0),  # half of an unknown 心梗死: 心肌梗死死 would be worse
        ("冠状动脉心脏病发作", "冠心病发作", 1),  # the longest wording wins over 心脏病
        ("冠状动脉心脏病变", "冠状动脉心脏病变", 0),  # 心脏 + 病变
        ("冠状动脉心脏病人，冠状动脉心脏病史", "冠状动脉心脏病人，冠状动脉心脏病史", 0),
        ("糖化酶升高，糖化升高", "糖化酶升高，糖化血红蛋白升高", 1),
        ("MI患者", "心肌梗死患者", 1),
        ("患者MI。", "患者心肌梗死。", 1),
        ("患者在MIT，mild，mi，MI-24，x.MI", "患者在MIT，mild，mi，MI-24，x.MI", 0),
        ("患者（MI/MI）", "患者（心肌梗死/心肌梗死）", 2),
        ("有Heart Disease和HEART DISEASE", "有心脏病和心脏病", 2),
        ("有heart diseases", "有heart diseases", 0),
        ("查hba1x", "查糖化血红蛋白", 1),
        ("The patient had MI and heart disease.", "The patient had MI and heart disease.", 0),
        ("The patient had MI.\n患者MI", "The patient had MI.\n患者心肌梗死", 1),
        ("<|心梗|>心梗<think>", "<|心梗|>心肌梗死<think>", 1),
        ("见 https://a.cn/心梗?q=心梗 ，心梗", "见 https://a.cn/心梗?q=心梗 ，心肌梗死", 1),
        ("www.心梗.com MI@患者.com `心梗`", "www.心梗.com MI@患者.com `心梗`", 0),
        ("[INST]心梗[/INST]", "[INST]心肌梗死[/INST]", 1),
        ("", "", 0),
    ],
)
def test_normalize(text: str, expected: str, count: int) -> None:
    assert TermNormalizer(HEART).normalize(text) == (expected, count)


def test_no_stutter_before_a_replacement() -> None:
    normalizer = TermNormalizer(pack_of({"甲状腺亢进": ["状腺亢进症"]}))
    assert normalizer.normalize("甲状腺亢进症，状腺亢进症") == ("甲状腺亢进症，甲状腺亢进", 1)


def test_a_pack_without_terms_changes_nothing() -> None:
    assert TermNormalizer(pack_of({})).normalize("心梗") == ("心梗", 0)


def test_a_replacement_that_completes_a_longer_wording_settles() -> None:
    normalizer = TermNormalizer(pack_of({"ab甲": ["xy"], "终点": ["ab甲乙"]}))
    assert normalizer.normalize("甲xy乙") == ("甲终点", 2)


def test_terms_that_feed_each_other_leave_the_text_alone() -> None:
    normalizer = TermNormalizer(pack_of({"乙乙丙": ["甲丙丁"], "甲丙": ["乙乙丙丁丁"]}))
    text = "甲丙丁" + "丁" * 30
    once, _ = normalizer.normalize(text)
    assert normalizer.normalize(once)[0] == once


@pytest.mark.parametrize("name", ["medical", "legal", "psychology", "exam"])
def test_idempotent_on_random_mixtures_of_wordings(name: str) -> None:
    pack = load_pack(name)
    normalizer = TermNormalizer(pack)
    words = [word for term in pack.terms for word in (term.canonical, *term.variants, term.english)]
    pieces = [*words, *pack.protected_words, *"的和，。 病症急性非型期A1-/.", "<|im_end|>", "https://a.b/", "\n"]
    rng = random.Random(7)
    changed = 0
    for _ in range(400):
        # Whole wordings side by side, and random halves of them: the border cases between two terms.
        text = "".join(
            piece if rng.random() < 0.7 else piece[: rng.randint(1, len(piece))]
            for piece in rng.choices(pieces, k=rng.randint(1, 12))
        )
        once, count = normalizer.normalize(text)
        changed += count
        assert normalizer.normalize(once) == (once, 0), text
    assert changed > 200


def test_idempotent_on_random_packs() -> None:
    rng = random.Random(11)
    for _ in range(300):
        words = list({"".join(rng.choices("甲乙丙ab", k=rng.randint(2, 4))) for _ in range(12)})
        rng.shuffle(words)
        normalizer = TermNormalizer(pack_of({words[i]: [words[i + 1]] for i in range(0, len(words) - 1, 2)}))
        text = "".join(rng.choices("甲乙丙ab ", k=30))
        once, _ = normalizer.normalize(text)
        assert normalizer.normalize(once)[0] == once
