"""A training cannot be lost: kill -9 at any instant, then `--resume auto` ends with the bits of the undisturbed run.

`make torture`: KILLS (default 200) for each of SFT, DPO and QLoRA, a fifth of that for extended runs. `make test` has a
smaller round in tests/reliability/test_fault_rows_kill.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HARNESS = Path(__file__).with_name("kill_harness.py")
KILLS = int(os.environ.get("KILLS", "200"))


@pytest.mark.torture
@pytest.mark.parametrize(("case", "kills"), [("sft", KILLS), ("dpo", KILLS), ("qlora", KILLS), ("extend", KILLS // 5)])
def test_kills(tmp_path: Path, case: str, kills: int) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(tmp_path), os.environ.get("SEED", "7"), f"{case}={kills}"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0
    figures = json.loads(done.stdout.splitlines()[-1])[case]
    print(case, figures)
    assert figures["kills"] == kills
    assert figures["wrong"] == []
    assert figures["most_steps_lost"] <= 1  # a save at every step
