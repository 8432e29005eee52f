"""Multiple-choice questions in C-Eval's prompt style, so that the model knows to answer with one letter."""

from __future__ import annotations

from random import Random

SUBJECTS = (
    "基础医学",
    "法学",
    "教育学",
    "计算机网络",
    "临床医学",
    "逻辑学",
    "高中生物",
    "初中物理",
    "艺术学",
    "工商管理",
)
_GROUPS = {
    "水果": ("苹果", "香蕉", "葡萄", "西瓜", "桃子", "草莓", "橙子", "梨"),
    "蔬菜": ("白菜", "萝卜", "菠菜", "黄瓜", "茄子", "芹菜", "土豆", "冬瓜"),
    "动物": ("老虎", "兔子", "大象", "猴子", "绵羊", "燕子", "鲤鱼", "青蛙"),
    "颜色": ("红色", "黄色", "蓝色", "绿色", "白色", "黑色", "紫色", "灰色"),
    "内脏器官": ("心脏", "肝脏", "肺", "肾脏", "胃", "脾脏", "胰腺", "膀胱"),
    "职业": ("医生", "教师", "律师", "护士", "司机", "厨师", "农民", "工程师"),
    "季节": ("春季", "夏季", "秋季", "冬季"),
    "乐器": ("钢琴", "二胡", "笛子", "小提琴", "古筝", "吉他"),
    "交通工具": ("汽车", "火车", "飞机", "轮船", "自行车", "地铁"),
    "文具": ("铅笔", "橡皮", "尺子", "钢笔", "本子", "圆规"),
}
_STEMS = ("下列选项中，属于{g}的是____。", "以下哪一项是{g}____", "下面的词语里，____是{g}。", "属于{g}的一项是____。")


def draw_choice(random: Random) -> tuple[str, list[str], str]:
    """One (question, four options, letter of the right one)."""
    if random.random() < 0.3:
        a, b = random.randint(1, 30), random.randint(1, 30)
        right, question = str(a + b), random.choice((f"{a}+{b}=____。", f"{a}与{b}的和是____。"))
        wrong = [str(value) for value in random.sample([v for v in range(2, 61) if v != a + b], 3)]
    else:
        group, *others = random.sample(sorted(_GROUPS), 4)
        question, right = random.choice(_STEMS).format(g=group), random.choice(_GROUPS[group])
        wrong = [random.choice(_GROUPS[other]) for other in others]
    place = random.randrange(4)
    return question, [*wrong[:place], right, *wrong[place:]], "ABCD"[place]


def format_choice(question: str, options: list[str]) -> str:
    """Question, lettered options and the answer prompt, each on its own line."""
    lines = [f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True)]
    return "\n".join([question, *lines, "答案："])


def draw_exam(random: Random) -> list[tuple[str, str]]:
    """0 to 3 worked examples and a question, as (user, assistant) turns; the instruction opens the first turn."""
    head = f"以下是中国关于{random.choice(SUBJECTS)}考试的单项选择题，请选出其中的正确答案。\n\n"
    turns = []
    for _ in range(random.choice((1, 1, 2, 4))):
        question, options, letter = draw_choice(random)
        turns.append((format_choice(question, options), letter))
    turns[0] = (head + turns[0][0], turns[0][1])
    if random.random() < 0.5:  # all examples in one user turn
        *shots, (last, letter) = turns
        return [("\n\n".join([*(f"{text}{answer}" for text, answer in shots), last]), letter)]
    return turns
