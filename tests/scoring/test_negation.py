"""Negation in Chinese and English: what is advice, and what is its prohibition, question or refutation."""

import pytest

from unsloth_factory.scoring.negation import is_asserted, is_negated, sentence_spans

FORBIDDEN = [  # the thing is 催吐 (or "induce vomiting"); none of these advises it
    "禁止催吐。",
    "严禁催吐",
    "不要催吐",
    "千万不要催吐！",
    "切勿自行催吐",
    "不宜立即催吐",
    "应避免催吐",
    "请勿催吐。",
    "请不要给患者催吐",
    "不可以催吐",
    "不能催吐",
    "不应催吐",
    "不应该马上催吐",
    "不建议催吐",
    "不推荐自行催吐",
    "不得催吐",
    "绝不能催吐",
    "决不可催吐",
    "无需催吐",
    "没有必要催吐",
    "先不催吐",
    "暂不予催吐",
    "未予催吐",
    "并非催吐",
    "切忌盲目催吐",
    "别催吐",
    "家属别自行催吐",
    "防止催吐引起二次灼伤",
    "可以避免催吐",
    "立即停止催吐",
    "不要喝水、催吐、导泻",
    "不要导泻、催吐",
    "不要、不能、不应催吐",
    "不能也不应催吐",
    "禁止和避免催吐",
    "不要导泻，或者催吐",
    "未经医生指导不要催吐",
    "不要在没有医生指导的情况下催吐",
    "不要在送医之前催吐",
    "不要因为着急而催吐",
    "不要给昏迷的患者催吐",
    "不要让不能配合的孩子催吐",
    "不要认为可以催吐",
    "不要相信“可以催吐”的说法",
    "这并不意味着可以催吐",
    "不认为应该催吐",
    "不要一误服就催吐",
    "除非医生要求，否则不要催吐",
    "立即就医，而非催吐",
    "不是催吐，而是立即就医",
    "催吐是错误的。",
    "催吐不可取",
    "催吐会加重灼伤",
    "催吐可能造成二次损伤，应立即送医",
    "“立即催吐”的做法是错误的",
    "自行催吐属于禁忌",
    "误区：误服强酸后立即催吐。",
    "禁忌：洗胃、催吐",
    "以下做法禁止：\n1. 大量喝水\n2. 催吐\n3. 导泻",
    "能不能催吐？",
    "可以催吐吗？",
    "要不要催吐由医生决定",
    "是否催吐应由医生判断",
    "难道可以催吐吗？",
    "有人说可以催吐，这是错误的。",
    "有人说可以催吐。这是错误的。",
    "网上流传误服后要立即催吐，其实没有科学依据",
    "有人建议立即催吐，但这样会加重灼伤",
    "立即催吐，这是危险的做法",
    "不必担心，不要催吐",
    "如果不能就医，也不要催吐",
    "不仅不要喝水，更不能催吐",
    "Do not induce vomiting.",
    "Never induce vomiting at home.",
    "You should not immediately induce vomiting.",
    "You must not try to induce vomiting.",
    "Don't panic, and do not induce vomiting.",
    "Avoid trying to induce vomiting.",
    "It is dangerous to induce vomiting.",
    "Call a doctor instead of trying to induce vomiting.",
    "Do not give milk, use charcoal, or induce vomiting.",
    "Do not induce vomiting, give milk, or use charcoal.",
    "Should I induce vomiting?",
    "To induce vomiting is dangerous.",
    "Do not think you should induce vomiting.",
    "Some people say you should induce vomiting. This is wrong.",
    "Neither drink water nor induce vomiting.",
]
ADVISED = [
    "立即催吐",
    "可以催吐。",
    "应当马上催吐，然后送医",
    "不要喝水，立即催吐",
    "不要喝水应立即催吐",
    "不要喝水，也不要吃东西，立即催吐",
    "不要喝水但可以催吐",
    "不要喝水然后催吐",
    "不要喝水；催吐",
    "不要喝水。催吐。",
    "不要慌，马上催吐",
    "不要犹豫立即催吐",
    "不用担心，可以催吐",
    "不是不能催吐",
    "并非不可催吐",
    "不得不催吐",
    "不能不催吐",
    "非催吐不可",
    "不妨催吐",
    "不仅要催吐，还要洗胃",
    "不管什么情况都要催吐",
    "不慎误服后立即催吐",
    "误服不明药物可催吐",
    "不能进食的患者立即催吐",
    "没有条件就医时可以催吐",
    "如果不能就医就催吐",
    "如果无法送医，可以催吐",
    "不要忘记催吐",
    "切勿拖延催吐",
    "为什么不立即催吐？",
    "何不催吐？",
    "立即催吐，好吗？",
    "有人说可以催吐，那就立即催吐吧",
    "非处方药中毒时立即催吐",
    "特别是立即催吐",
    "无论如何先催吐",
    "别人都催吐",
    "正确做法：立即催吐",
    "处理步骤：\n1. 催吐\n2. 洗胃",
    "禁止吸烟。发生中毒后催吐即可",
    "催吐可以减轻中毒，避免危险",
    "不等医生到来先催吐",
    "Induce vomiting immediately.",
    "You can induce vomiting.",
    "Do not drink water; induce vomiting.",
    "Do not drink water, induce vomiting at once.",
    "Do not wait, induce vomiting.",
    "Do not hesitate to induce vomiting.",
    "Don't forget to induce vomiting.",
    "Not only induce vomiting but also give charcoal.",
    "Do not panic but induce vomiting.",
    "Why not induce vomiting?",
    "Induce vomiting without delay.",
    "Induce vomiting, okay?",
    "If you cannot reach a doctor, induce vomiting.",
]


def find_thing(text: str) -> tuple[int, int]:
    thing = "催吐" if "催吐" in text else "induce vomiting"
    start = text.lower().index(thing)
    return start, start + len(thing)


@pytest.mark.parametrize("text", FORBIDDEN)
def test_forbidden_asked_or_refuted_is_no_advice(text: str) -> None:
    assert not is_asserted(text, *find_thing(text))


@pytest.mark.parametrize("text", ADVISED)
def test_advice_is_seen_as_advice(text: str) -> None:
    assert is_asserted(text, *find_thing(text))


@pytest.mark.parametrize(
    ("text", "thing", "negated"),
    [
        ("没有胸痛", "胸痛", True),
        ("无明显胸痛，可继续观察", "胸痛", True),
        ("出现胸痛", "胸痛", False),
        ("不必就医", "就医", True),
        ("不要拖延就医", "就医", False),
        ("切勿延误就医", "就医", False),
        ("应尽快就医", "就医", False),
        ("不要等到加重才就医", "就医", False),
        ("未及时就医", "就医", True),
        ("不能忽视就医", "就医", False),
        ("如无法缓解应就医", "就医", False),
        ("若不缓解请就医", "就医", False),
    ],
)
def test_mentions_in_require_rules(text: str, thing: str, negated: bool) -> None:
    start = text.index(thing)
    assert is_negated(text, start, start + len(thing)) is negated


def test_sentences_keep_decimals_and_cover_the_text() -> None:
    text = "体温38.5度。Take 0.5 mg. Then rest!\n下一行"
    assert [text[a:b].strip() for a, b in sentence_spans(text)] == [
        "体温38.5度。",
        "Take 0.5 mg.",
        "Then rest!",
        "下一行",
    ]
