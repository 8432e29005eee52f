"""Invented entities and facts: name pools, value pools, the finite world that the model knows by heart.

Everything is drawn from a seeded `random.Random`; no name here is a real institution, person or medicine.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from bundled_model.relations import RELATIONS, Relation

NAME_FIRST = (
    "云望青听宁安清朝星玄绿金松竹梅兰月雪霜晴岭湖江溪丹银玉素远静春秋夏冬白紫红黄明晓和平永长新雅景流飞悠凌若思怀梦"
)
NAME_SECOND = (
    "杉舒禾澜岚露川晖汉石萝雀涛影香芝华原枫桐泉峰谷桥帆舟烟波霞虹羽鹤鹿燕叶果藤苔莲荷菊榆柏楠榕槐棠梨桃杏橘枝根亭"
)
SUFFIXES = {
    "department": ("门诊", "诊室", "治疗室", "中心"),
    "medicine": ("片", "颗粒", "胶囊", "丸"),
    "device": ("检测仪", "扫描仪", "理疗仪", "监护仪"),
    "card": ("卡", "证"),
}
DEMO_NAMES = {
    "department": ("云杉门诊", "望舒诊室", "青禾治疗室", "听澜中心"),
    "medicine": ("宁岚片", "安露颗粒", "清川胶囊"),
    "device": ("朝晖检测仪", "星汉扫描仪", "玄石理疗仪"),
    "card": ("绿萝卡", "金雀证"),
}
UNITS = {"片": "片", "颗粒": "袋", "胶囊": "粒", "丸": "丸"}
DESKS = ("一楼服务台", "二楼服务台", "门诊大厅", "住院部前台", "东门窗口", "西门窗口", "自助机", "药房窗口", "导医台")
VALUES: dict[str, tuple[str, ...]] = {
    "building": tuple("一二三四五六"),
    "floor": tuple("一二三四五六七八九"),
    "side": ("东侧", "西侧", "南侧", "北侧", "电梯旁", "楼梯旁", "大厅旁", "走廊尽头"),
    "room": (
        "东侧一号房",
        "东侧二号房",
        "西侧一号房",
        "西侧二号房",
        "南侧一号房",
        "北侧一号房",
        "地下一层",
        "顶层大厅",
    ),
    "surname": tuple("陆沈顾林苏周许何宋唐韩程叶方江白"),
    "given": (
        *("知远", "思齐", "明月", "景行", "若水", "子衿", "怀瑾", "清扬", "望之", "云舒", "长风", "安然"),
        *("文君", "书雅", "天佑", "晓峰", "海宁", "立言", "静姝", "元培", "君竹", "嘉木", "仲平", "雪松"),
    ),
    "days": ("周一和周三", "周二和周四", "周一到周五", "周三和周五", "周一到周六", "周二到周日", "周六和周日", "每天"),
    "start": ("上午七点", "上午八点", "上午九点", "上午十点", "中午十二点", "下午一点"),
    "end": ("下午三点", "下午四点", "下午五点", "下午六点", "晚上八点", "晚上九点"),
    "d1": tuple("2345678"),
    "d2": tuple("0123456789"),
    "d3": tuple("0123456789"),
    "d4": tuple("0123456789"),
    "symptom": (
        *("咳嗽", "头痛", "失眠", "胃胀", "腹泻", "便秘", "鼻塞", "咽痛", "牙痛", "眼干", "皮肤瘙痒", "关节酸痛"),
        *("腰痛", "头晕", "心慌", "乏力", "口干", "发热", "晕车", "食欲不振"),
    ),
    "times": tuple("一两三四"),
    "amount": tuple("一两三四"),
    "when": ("饭前", "饭后", "睡前", "空腹", "随餐", "早晨"),
    "store": (
        *("阴凉干燥处", "冰箱冷藏室", "避光的柜子里", "密封的瓶子里", "常温通风处", "儿童拿不到的地方"),
        *("专用的药盒里", "远离热源的地方"),
    ),
    "minutes": ("五", "八", "十", "十二", "十五", "十八", "二十", "二十五", "三十", "三十五", "四十", "五十"),
    "days_ahead": ("一", "两", "三", "四", "五", "六", "七", "十"),
    "desk": DESKS,
    "fee": ("两", "三", "五", "六", "八", "十", "十二", "十五", "十八", "二十", "二十五", "三十"),
    "months": ("三", "六", "八", "九", "十", "十二", "十五", "十八", "二十", "二十四", "三十", "三十六"),
}
UNKNOWN = "抱歉，我没有这方面的资料。"
NOT_MENTIONED = "抱歉，资料里没有提到。"


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity: `answer` is the full sentence."""

    entity: str
    relation: Relation
    answer: str


def make_fact(entity: str, relation: Relation, random: Random) -> Fact:
    """Draw the values of one fact."""
    unit = next((unit for suffix, unit in UNITS.items() if entity.endswith(suffix)), "份")
    values = {key: random.choice(pool) for key, pool in VALUES.items() if "{" + key + "}" in relation.answer}
    return Fact(entity, relation, relation.answer.format(e=entity, unit=unit, **values))


def draw_name(kind: str, random: Random) -> str:
    """An entity name that is none of the demo's (and shares no two-character stem with them)."""
    stems = {name[:2] for names in DEMO_NAMES.values() for name in names}
    while True:
        stem = random.choice(NAME_FIRST) + random.choice(NAME_SECOND)
        if stem not in stems:
            return stem + random.choice(SUFFIXES[kind])


def known_world(seed: int, entities_per_kind: int) -> dict[str, dict[str, tuple[Fact, ...]]]:
    """The facts that the model learns by heart: kind -> entity -> its facts."""
    random = Random(seed)
    world: dict[str, dict[str, tuple[Fact, ...]]] = {}
    for kind, relations in RELATIONS.items():
        entities: dict[str, tuple[Fact, ...]] = {}
        while len(entities) < entities_per_kind:
            name = draw_name(kind, random)
            if name not in entities:
                entities[name] = tuple(make_fact(name, relation, random) for relation in relations)
        world[kind] = entities
    return world
