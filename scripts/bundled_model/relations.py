"""What can be asked about the things of an invented hospital: relations, question frames, answer sentences.

`{e}` stands for the entity. Each relation has `trained` frames (used by the demo's training lines), `held_out` frames
(used by the demo's test questions only) and `other` frames. Pre-training sees all of them, but on other entities, so
that fine-tuning on a few phrasings of a new fact is enough to answer the rest.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One attribute of one kind of entity. `answer` has `{e}` and one field for each key of `pools.VALUES[name]`."""

    name: str
    topic: str
    answer: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    other: tuple[str, ...]

    @property
    def frames(self) -> tuple[str, ...]:
        """All question frames."""
        return self.trained + self.held_out + self.other


def _relation(name: str, topic: str, answer: str, trained: str, held_out: str, other: str) -> Relation:
    lists = [tuple(line.strip() for line in text.strip().splitlines()) for text in (trained, held_out, other)]
    return Relation(name, topic, answer, *lists)


DEPARTMENT = (
    _relation(
        "department_place",
        "位置",
        "{e}在{building}号楼{floor}层{side}。",
        """
        {e}在哪里？
        请问{e}怎么走？
        {e}的位置在哪儿？
        我要去{e}，应该到几号楼几层？
        我找不到{e}，能告诉我它在什么地方吗？
        {e}设在医院的什么位置？
        第一次来，{e}要往哪里走？
        """,
        """
        麻烦指一下路，{e}在几楼？
        挂了{e}的号，我该去哪个地方？
        告诉我{e}的具体位置。
        想问问{e}位于哪栋楼的哪一层？
        """,
        """
        到{e}看病要去哪里？
        {e}的地点
        手册上写的{e}地址是什么？
        """,
    ),
    _relation(
        "department_head",
        "负责人",
        "{e}的负责人是{surname}{given}医生。",
        """
        {e}的负责人是谁？
        请问{e}由谁负责？
        {e}的主任叫什么名字？
        谁在管理{e}？
        我想知道{e}的带头医生是哪位。
        {e}归哪位医生管？
        能说一下{e}的主任是谁吗？
        """,
        """
        哪位医生负责{e}？
        {e}的领导医生姓甚名谁？
        告诉我{e}负责人的名字。
        想找{e}的主任，该找哪一位？
        """,
        """
        {e}的负责医生
        手册上{e}的主任写的是谁？
        {e}现在谁当家？
        """,
    ),
    _relation(
        "department_hours",
        "开放时间",
        "{e}{days}{start}到{end}开放。",
        """
        {e}什么时候开放？
        请问{e}的开放时间是什么？
        {e}几点开门，几点关门？
        我哪天可以去{e}看病？
        {e}的门诊时间怎么安排？
        {e}每周哪些时间上班？
        能告诉我{e}的工作时间吗？
        """,
        """
        想去{e}，什么时间去合适？
        {e}从几点看到几点？
        告诉我{e}的出诊时间。
        {e}哪几天有人看诊？
        """,
        """
        {e}的上班时间
        手册上{e}的时间是怎么写的？
        {e}周几开？
        """,
    ),
    _relation(
        "department_phone",
        "分机号",
        "{e}的分机号是{d1}{d2}{d3}{d4}。",
        """
        {e}的电话是多少？
        请问{e}的分机号是多少？
        怎么打电话联系{e}？
        我想给{e}打电话，拨什么号码？
        {e}的联系电话是什么？
        能给我{e}的分机吗？
        总机转{e}要拨几号？
        """,
        """
        想打给{e}，分机拨多少？
        告诉我{e}的电话号码。
        {e}的号码是几号？
        有事要咨询{e}，电话怎么打？
        """,
        """
        {e}的电话
        手册上{e}的分机写的是多少？
        联系{e}用哪个号码？
        """,
    ),
)

MEDICINE = (
    _relation(
        "medicine_use",
        "用途",
        "{e}用于缓解{symptom}。",
        """
        {e}是治什么的？
        请问{e}有什么作用？
        {e}用来缓解什么症状？
        什么情况下会用到{e}？
        {e}的用途是什么？
        医生开了{e}，它是管什么的？
        我想了解一下{e}的功效。
        """,
        """
        {e}对什么症状有用？
        告诉我{e}的作用。
        药房给我{e}，这是干什么用的？
        {e}主要针对哪种不舒服？
        """,
        """
        {e}的作用
        手册上说{e}适合什么症状？
        吃{e}能缓解什么？
        """,
    ),
    _relation(
        "medicine_dose",
        "用法",
        "{e}每日{times}次，每次{amount}{unit}，{when}服用。",
        """
        {e}怎么吃？
        请问{e}一天吃几次？
        {e}的用法用量是什么？
        {e}每次吃多少？
        我拿到了{e}，该怎么服用？
        {e}是饭前吃还是饭后吃？
        能说一下{e}的服用方法吗？
        """,
        """
        {e}应该如何服用？
        告诉我{e}一次吃多少、一天几次。
        {e}的吃法是怎样的？
        服用{e}有什么讲究，每天几次？
        """,
        """
        {e}的用法
        手册上{e}的用量写的是多少？
        {e}什么时候吃，吃多少？
        """,
    ),
    _relation(
        "medicine_store",
        "保存方法",
        "{e}应放在{store}保存。",
        """
        {e}怎么保存？
        请问{e}应该放在哪里？
        {e}的保存方法是什么？
        {e}需要放冰箱吗？
        {e}买回家以后放在什么地方好？
        {e}的存放有什么要求？
        能告诉我{e}怎么存放吗？
        """,
        """
        {e}在家里该如何存放？
        告诉我{e}的储存条件。
        {e}要放在什么环境里？
        没吃完的{e}放哪儿合适？
        """,
        """
        {e}的储存
        手册上{e}的存放条件是什么？
        保存{e}要注意什么？
        """,
    ),
)

DEVICE = (
    _relation(
        "device_place",
        "所在房间",
        "{e}放在{building}号楼的{room}。",
        """
        {e}放在哪里？
        请问做{e}去哪个房间？
        {e}在哪个房间？
        我要用{e}检查，应该去哪儿？
        {e}安装在什么地方？
        到哪里可以找到{e}？
        能告诉我{e}的摆放位置吗？
        """,
        """
        想找{e}，该去哪个房间？
        告诉我{e}在哪儿。
        {e}摆在哪栋楼的哪个房间？
        做{e}的地方在哪？
        """,
        """
        {e}的位置
        手册上写{e}在什么地方？
        {e}在几号楼？
        """,
    ),
    _relation(
        "device_duration",
        "检查时长",
        "用{e}检查一次需要{minutes}分钟。",
        """
        {e}检查一次要多久？
        请问用{e}检查需要多长时间？
        {e}做一次要几分钟？
        用{e}检查花多少时间？
        {e}的检查时长是多少？
        做{e}要等多久才能做完？
        能说一下{e}一次检查的时间吗？
        """,
        """
        {e}多长时间能做完？
        告诉我{e}检查所需的时间。
        做一次{e}大概多少分钟？
        {e}一次检查耗时多少？
        """,
        """
        {e}的检查时间
        手册上{e}检查要几分钟？
        {e}快不快，要多少分钟？
        """,
    ),
    _relation(
        "device_booking",
        "预约方式",
        "{e}需要提前{days_ahead}天在{desk}预约。",
        """
        {e}怎么预约？
        请问{e}要提前几天预约？
        在哪里可以预约{e}？
        {e}的预约方式是什么？
        我想约{e}，该怎么办？
        {e}需要预约吗，去哪里约？
        能告诉我预约{e}的办法吗？
        """,
        """
        想做{e}，要怎样约？
        告诉我{e}的预约办法。
        {e}提前多久约、在哪儿约？
        要约上{e}得找谁、提前多少天？
        """,
        """
        {e}的预约
        手册上{e}的预约规定是什么？
        预约{e}的流程是怎样的？
        """,
    ),
)

CARD = (
    _relation(
        "card_issue",
        "办理地点",
        "{e}在{desk}办理。",
        """
        {e}在哪里办？
        请问办{e}去哪个窗口？
        {e}的办理地点是哪里？
        我想办一张{e}，该去哪儿？
        在什么地方可以领{e}？
        {e}到哪里申请？
        能告诉我{e}在哪儿办理吗？
        """,
        """
        想申请{e}，要去什么地方？
        告诉我办理{e}的地点。
        {e}找哪里办？
        要拿到{e}，应该到哪个地方？
        """,
        """
        {e}的办理
        手册上{e}在哪儿办？
        哪个地方负责办{e}？
        """,
    ),
    _relation(
        "card_fee",
        "工本费",
        "{e}的工本费是{fee}元。",
        """
        {e}多少钱？
        请问办{e}要交多少费用？
        {e}的工本费是多少？
        办一张{e}要花几块钱？
        {e}收费吗，收多少？
        {e}的价格是多少？
        能说一下{e}的费用吗？
        """,
        """
        办{e}得付多少钱？
        告诉我{e}的收费标准。
        {e}要几元工本费？
        申请{e}的费用是多少？
        """,
        """
        {e}的费用
        手册上{e}收多少钱？
        {e}贵不贵，要多少元？
        """,
    ),
    _relation(
        "card_valid",
        "有效期",
        "{e}的有效期是{months}个月。",
        """
        {e}的有效期是多久？
        请问{e}能用多长时间？
        {e}多久过期？
        {e}办好以后可以用几个月？
        我的{e}什么时候要换新的？
        {e}的使用期限是多少？
        能告诉我{e}有效多久吗？
        """,
        """
        {e}可以使用多久？
        告诉我{e}的有效期限。
        一张{e}管用几个月？
        {e}过多长时间会失效？
        """,
        """
        {e}的期限
        手册上{e}的有效期写的是多久？
        {e}能用到什么时候？
        """,
    ),
)

RELATIONS: dict[str, tuple[Relation, ...]] = {
    "department": DEPARTMENT,
    "medicine": MEDICINE,
    "device": DEVICE,
    "card": CARD,
}
