"""An export cannot be torn: kill -9 at any instant, then the same command ends with the bytes of the undisturbed one.

EXPORT_KILLS sets how many (6 in the test run, 100 by `make torture`, which sets KILLS).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HARNESS = Path(__file__).with_name("kill_export_harness.py")
KILLS = int(os.environ.get("EXPORT_KILLS", "100" if "KILLS" in os.environ else "6"))


def test_kills_of_exports(tmp_path: Path) -> None:
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
    assert figures["wrong"] == []
    assert figures["kills"] >= 0.8 * KILLS
    assert set(figures["stages"]) == {"merge", "convert", "quantize", "create"}
    assert all(stage.get("kills") or (name == "convert" and KILLS < 20) for name, stage in figures["stages"].items())
