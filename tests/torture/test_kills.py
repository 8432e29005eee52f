"""A training cannot be lost: kill -9 at any instant, then `--resume auto` ends with the bits of the undisturbed run.

KILLS sets how many (20 in the test run, 200 by `make torture`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).with_name("kill_harness.py")
KILLS = int(os.environ.get("KILLS", "20"))


def test_kills(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(HARNESS), str(tmp_path), str(KILLS), os.environ.get("SEED", "7")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    assert figures["kills"] == KILLS
    assert figures["wrong"] == []
    assert figures["runs"] >= 2
