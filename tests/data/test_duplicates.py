"""n-grams, near duplicates and leaks against slow and plain versions of themselves."""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest

from unsloth_factory.data.duplicates import SIMILARITY, Duplicates, Group, find_duplicates
from unsloth_factory.data.leakage import COMMON, SHARE, WORDS, find_leaks
from unsloth_factory.data.ngrams import character_ngrams, normalized, word_ngrams
from unsloth_factory.data.types import Conversation, PreferencePair, Turn

TEXTS = [
    "Hello, big world again!",
    "hello big-world\tagain",
    "",
    "高血压患者 120/80 mmHg，怎么办？",
    "x",
    "a高b c血d",
    "naïve café über",
    "한국어 문장 하나",
    "日本語のテキスト",
    "...",
    "🦙🦙 two llamas",
    "สวัสดี ab",
]


def plain_words(text: str) -> list[str]:
    """Words one by one: a letter run, or one character of a script without blanks."""
    words: list[str] = []
    joined = False
    for c in text:
        alone = re.match(r"[\u0e00-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]", c)
        if not (c.isalnum() or unicodedata.combining(c)):
            joined = False
        elif alone:
            words.append(c)
            joined = False
        elif joined:
            words[-1] += c
        else:
            words.append(c)
            joined = True
    return words


@pytest.mark.parametrize("n", [1, 2, 3])
def test_word_ngrams_are_those_of_plain_words(n):
    hashes, owners, counts = word_ngrams(TEXTS, n)
    plain = [plain_words(text) for text in TEXTS]
    assert counts.tolist() == [len(words) for words in plain]
    expected = [
        (i, tuple(words[k : k + n])) for i, words in enumerate(plain) for k in range(max(0, len(words) - n + 1))
    ]
    assert owners.tolist() == [i for i, _ in expected]
    by_gram: dict = {}
    for value, (_, gram) in zip(hashes.tolist(), expected, strict=True):
        assert by_gram.setdefault(gram, value) == value, "equal n-grams, equal hashes"
    assert len(set(by_gram.values())) == len(by_gram), "other n-grams, other hashes"


def test_word_hashes_do_not_depend_on_the_place():
    alone = word_ngrams(["big world again"], 3)[0]
    behind = word_ngrams(["x" * 5000 + " big world again"], 3)[0]
    assert alone[0] == behind[-1]


def test_character_ngrams():
    texts = ["abcdef", "cdefg", "ab", "ab", "高血压患者吃"]
    hashes, owners = character_ngrams(texts, 5, [0, 0, 0, 1, 0])
    assert owners.tolist() == [0, 0, 1, 2, 3, 4, 4]
    assert len(set(hashes.tolist())) == 7, "bcdef and cdefg differ, and so do salts"
    assert character_ngrams(["xxbcdef"], 5, [0])[0][-1] == hashes[1]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Hello  World", "hello world"),
        ("ＡＢＣ１２３", "abc123"),
        ("cafe\u0301", "CAFÉ"),
        ("高血压 患者", "高血压患者"),
        ("吃 aspirin 吗", "吃aspirin吗"),
        ("a\u3000b\n\tc", "a b c"),
        ("ﬁne", "FINE"),
    ],
)
def test_normalized(a, b):
    assert normalized(a) == normalized(b)
    assert normalized("1 2") != normalized("12")


def row(question: str, answer: str, system: str = "") -> Conversation:
    turns = (Turn("user", question), Turn("assistant", answer))
    return Conversation((Turn("system", system), *turns) if system else turns, "f:1")


def grams(item: Conversation) -> set:
    """5-character pieces of the normalised turns, with their roles."""
    found = set()
    for turn in item.turns:
        text = normalized("\n" + turn.content)
        found |= {(turn.role, text[i : i + 5]) for i in range(max(1, len(text) - 4))}
    return found


def test_near_duplicates_are_those_of_the_plain_similarity():
    """Every row that is 0.9 alike to one that stays is found, and no other."""
    source = random.Random(5)
    letters = [chr(0x4E00 + i) for i in range(400)]
    rows = [row("".join(source.choices(letters, k=30)), "".join(source.choices(letters, k=160))) for _ in range(60)]
    for original in list(rows):
        for changes in (1, 1, 2, 2, 4):
            text = list(original.turns[1].content)
            for place in source.sample(range(len(text)), changes):
                text[place] = source.choice(letters)
            rows.append(row(original.turns[0].content, "".join(text)))
    source.shuffle(rows)
    found = find_duplicates(rows)
    assert not found.exact
    sets = [grams(item) for item in rows]
    expected = plain_near(rows, sets)
    assert 50 < len(expected) < 200
    # The bands may miss a pair that is barely alike: 2 in 1,000.
    missed = expected.keys() ^ found.near.keys()
    assert len(missed) <= len(rows) // 100


def plain_near(rows: list[Conversation], sets: list[set]) -> dict[int, int]:
    kept: list[int] = []
    near: dict[int, int] = {}
    for number in range(len(rows)):
        for other in kept:
            if len(sets[number] & sets[other]) >= SIMILARITY * len(sets[number] | sets[other]):
                near[number] = other
                break
        else:
            kept.append(number)
    return near


def test_what_makes_no_near_duplicate():
    text = "每天早晨空腹服用一片，连续服用两周，服药期间不要饮酒，如有不适请立即停药并就医。" * 2
    base = row("怎么吃？", text + "一次10毫克。", system="医生")
    assert find_duplicates([base, row("怎么吃？", text + "一次20毫克。", system="医生")]).near == {}
    assert find_duplicates([base, row("怎么吃？", text + "一次10毫克。", system="律师")]).near == {}
    assert find_duplicates([base, row("怎么吃？", text + "一次10毫克！", system="医生")]).near == {1: 0}
    assert find_duplicates([row("是", "否"), row("否", "是")]).near == {}
    longer = Conversation((*base.turns, Turn("user", "好"), Turn("assistant", "不客气")), "f:2")
    assert find_duplicates([base, longer]).near == {}
    assert find_duplicates([]) == Duplicates(0, {}, {})


def test_a_chain_of_small_steps_is_cut():
    """Each row is near the one before, the last is far from the first: compared with rows that stay."""
    letters = [chr(0x4E00 + i) for i in range(300)]
    text = letters[:100]
    rows = []
    for step in range(30):
        rows.append(row("问", "".join(text)))
        text[step * 3] = letters[100 + step]
    kept = [i for i in range(30) if i not in find_duplicates(rows).near]
    assert 5 <= len(kept) <= 20
    assert kept[0] == 0


def test_groups():
    items = [row("甲？", "一二三四"), row("甲？", "一二三四"), row("甲 ？", "一二三四"), row("甲  ？", "一二三四")]
    found = find_duplicates(items)
    assert (found.exact, found.near) == ({1: 0}, {2: 0, 3: 0})
    assert found.groups() == [Group(0, 0), Group(0, 0), Group(2, 0), Group(3, 0)]
    pair = PreferencePair((Turn("user", "q"),), Turn("assistant", "a"), Turn("assistant", "b"), "p:1")
    assert find_duplicates([pair, pair]).exact == {1: 0}


def words(source: random.Random, count: int) -> list[str]:
    return ["w" + "".join(source.choices("abcdefghij", k=3)) for _ in range(count)]


def test_leaks_are_those_of_the_plain_overlap():
    """Random rows with planted passages: the same rows, and the same overlaps, as set arithmetic gives."""
    source = random.Random(11)
    stock = words(source, 20)
    train = [[*words(source, 60), *(stock if i % 2 else [])] for i in range(40)]
    held = []
    for i in range(12):
        copied = train[i * 3][5 : 5 + i * 5]
        held.append([*words(source, 55 - i * 5), *copied, *(stock if i % 2 else [])])
    found = find_leaks([row("q", " ".join(t)) for t in train], [row("h", " ".join(h)) for h in held])

    def pieces(text: list[str]) -> set:
        return {tuple(text[k : k + WORDS]) for k in range(len(text) - WORDS + 1)}

    train_sets, held_sets = [pieces(t) for t in train], [pieces(h) for h in held]
    expected = {}
    for number, own in enumerate(held_sets):
        telling = {gram for gram in own if sum(gram in other for other in train_sets) <= COMMON}
        best = max(range(len(train)), key=lambda t: len(telling & train_sets[t]))
        share = len(telling & train_sets[best]) / len(telling)
        if share >= SHARE:
            expected[number] = (best, share)
    assert 2 <= len(expected) <= 8
    assert {leak.held_out: leak.train for leak in found.worst} == {held: best for held, (best, _) in expected.items()}
    assert [leak.overlap for leak in found.worst] == pytest.approx([share for _, share in expected.values()])
    assert found.train == {number for number, _ in expected.values()}


def test_the_strongest_evidence_is_reported():
    long = "请问高血压患者平时应该注意什么，可以吃党参和枸杞吗？"
    held = [row(long, "可以。")]
    train = [row(long, "不可以。"), row(long, "可以。"), row(long + " ", "可以。")]
    leaks = find_leaks(train, held)
    assert [(leak.train, leak.kind) for leak in leaks.worst] == [(1, "the same row")]
    assert leaks.train == {0, 1, 2}
    assert find_leaks([row("短？", "一")], [row("短？", "二")]).worst == [], "short rows leak as a whole or not at all"
    assert find_leaks([], held).worst == find_leaks(train, []).worst == []


def test_stock_phrases_alone_are_no_leak():
    phrase = "以上是对您提出的这个问题的建议希望对您有所帮助祝您身体早日健康"
    train = [row(f"{i}", f"{chr(0x4E00 + i) * 3}{phrase}") for i in range(COMMON + 5)]
    assert find_leaks(train, [row("别的", "完全不同" + phrase)]).worst == []
    few = find_leaks(train[:3], [row("别的", "完全不同" + phrase)])
    assert len(few.worst) == 1, "three rows make no stock phrase"


def test_hashes_are_the_same_in_every_process():
    """The report must not change from run to run."""
    assert character_ngrams(["abcde"], 5, [7])[0].tolist() == [_first_hash()]


def _first_hash() -> int:
    """The documented formula, in Python's integers."""
    mask, base = 2**64 - 1, 0x9E3779B97F4A7C15
    value = sum((ord(c) + 1) * pow(base, k, 2**64) for k, c in enumerate("abcde")) & mask
    value ^= 7
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & mask
    return int(np.uint64(value ^ (value >> 31)))
