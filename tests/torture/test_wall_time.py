"""--time_budget by the clock on the wall: from the start of the process to its exit, with noise on every step.

`make test` runs one short budget, `make torture` 60, 180 and 300 s.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from unsloth_factory.config.values import Seconds, convert

RUNNER = Path(__file__).with_name("noisy_training.py")


def timed_training(folder: Path, budget: int, seed: int) -> dict[str, Any] | None:
    """Train the bundled model in a process of its own; figures from outside and from what it left.

    None when half of the time went by before the training began: the machine is too busy for this budget.
    """
    folder.mkdir()
    rows = [
        {"instruction": f"第{i}号柜里放着什么？", "output": f"第{i}号柜里放着{i * 7 % 100}本书。"} for i in range(60)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    words = [
        "sft", "--model", "tiny", "--dataset", str(data), "--output_dir", str(folder / "run"), "--time_budget",
        f"{budget}s", "--epochs", "10000", "--max_seq_length", "128", "--val_split", "8", "--eval_steps", "100",
        "--save_steps", "50", "--learning_rate", "1e-3", "--accumulation_steps", "1",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}  # it would slow it
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        started = time.monotonic()
        command = [sys.executable, str(RUNNER), str(seed), *words]
        code = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False).returncode
        wall = time.monotonic() - started
    text = (folder / "log.txt").read_text(encoding="utf-8")
    started_after = re.search(r"Time box .* ([\dmh]+s?) of it used so far", text)
    assert started_after, text[-3000:]
    if convert(started_after[1], Seconds) > budget / 2:
        return None
    assert code == 0, text[-3000:]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    with safe_open(folder / "run" / "final_adapter" / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) > 0
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert (folder / "run" / f"checkpoint-{len(lines)}").is_dir()
    return {
        "budget": budget,
        "wall": round(wall, 2),
        "share": round(wall / budget, 4),
        "steps": len(lines),
        "exit": code,
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
        "evaluated_at_the_end": "eval_loss" in lines[-1],
        "last_rate": lines[-1]["lr"],
        "load": round(os.getloadavg()[0], 1),
    }


def test_a_short_budget(tmp_path: Path) -> None:
    for budget in (30, 60, 120):
        found = timed_training(tmp_path / str(budget), budget, seed=1)
        if found is not None:
            break
    print(found)
    assert found is not None, "the command needs more than a minute to start"
    # on a busy machine a step or an evaluation is a large share of what is left
    assert 0.85 * found["budget"] <= found["wall"] <= found["budget"]
    assert found["loss"][1] < found["loss"][0]
    assert found["last_rate"] < 1e-4


@pytest.mark.torture
@pytest.mark.parametrize("budget", [60, 180, 300])
def test_budgets(tmp_path: Path, budget: int) -> None:
    found = timed_training(tmp_path / "a", budget, seed=budget)
    print(found)
    assert found is not None
    assert 0.95 * budget <= found["wall"] <= budget
    assert found["loss"][1] < 0.5 * found["loss"][0]
    assert found["last_rate"] < 1e-5
