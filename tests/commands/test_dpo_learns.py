"""`uf dpo` learns a preference that holds on prompts it has never seen: complete and polite before rude or cut off."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from unsloth_factory.cli import main

PLACES = ("青石镇", "南溪村", "云桥县", "白沙湾", "东岭乡", "玉泉镇", "松林口", "晴川市", "双塔镇", "月牙岛")
THINGS = ("图书馆", "卫生院", "游泳馆", "博物馆", "汽车站", "邮局", "菜市场", "体育场")
POLITE = ("您好，{fact}如果还有不清楚的地方，欢迎继续提问。", "您好，{fact}出发前可以先打电话确认，祝您顺利。")
RUDE = ("这种问题也要问？自己去查。", "烦不烦，我怎么知道。", "随便吧，爱几点几点。", "别问我，没空。")


def preference_rows(seed: int = 7) -> list[dict[str, str]]:
    """One pair for each place and thing: the polite, complete answer, and a rude one or one that breaks off."""
    draw = random.Random(seed)
    rows = []
    for place in PLACES:
        for thing in THINGS:
            opens, closes = draw.randint(6, 10), draw.randint(16, 21)
            fact = f"{place}的{thing}每天上午{opens}点开门，晚上{closes}点关门。"
            cut = fact[: draw.randint(len(fact) // 3, len(fact) // 2)]
            rejected = draw.choice(RUDE) if draw.random() < 0.5 else cut
            chosen = draw.choice(POLITE).format(fact=fact)
            rows.append({"prompt": f"{place}的{thing}几点开门？", "chosen": chosen, "rejected": rejected})
    draw.shuffle(rows)
    return rows


def test_reward_accuracy_on_held_out_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "preferences.jsonl", tmp_path / "run"
    data.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in preference_rows()), encoding="utf-8")
    code = main([
        "dpo", "--model", "tiny", "--dataset", str(data), "--output_dir", str(run), "--val_split", "0.25",
        "--epochs", "2", "--batch_size", "4", "--accumulation_steps", "1", "--learning_rate", "1e-3",
        "--eval_steps", "15", "--max_seq_length", "256",
    ])  # fmt: skip
    printed = capsys.readouterr()
    assert code == 0, printed.err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[0]["rewards/margins"] == 0, "policy and reference are the same before the first update"
    assert lines[-1]["rewards/margins"] > lines[4]["rewards/margins"] > 0
    accuracy = lines[-1]["eval_rewards/accuracies"]
    assert accuracy >= 0.9
    shown = re.findall(r"eval_rewards/accuracies (\d\.\d\d) \[(\d\.\d\d), (\d\.\d\d)\]", " ".join(printed.out.split()))
    assert len(shown) == 2, "one evaluation half-way, one at the end"
    share, low, high = map(float, shown[-1])
    assert share == round(accuracy, 2)
    assert low < share <= high <= 1
