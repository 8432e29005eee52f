"""`uf validate` of 200 real samples on the bundled model, by the clock on the wall, as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

LIMIT = 60.0
"""Seconds on two cores, the start of the process included. It takes 39 on free cores, 47 to 55 on busier ones."""
MAIN = "from unsloth_factory.cli import main; raise SystemExit(main())"


@pytest.mark.torture
def test_200_real_samples_in_a_minute(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "medical" / "medical_o1_alpaca_300.json"
    words = ["validate", "--model", "tiny", "--dataset", str(data), "--max_samples", "200", "--save_dir", str(tmp_path)]
    # All cores, as a user has them, and no coverage in the child.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "OMP_"))}
    started = time.monotonic()
    outcome = subprocess.run([sys.executable, "-c", MAIN, *words], env=environment, capture_output=True, text=True)
    wall = time.monotonic() - started
    assert outcome.returncode == 0, outcome.stdout[-3000:] + outcome.stderr[-3000:]
    report = json.loads((tmp_path / "validation.json").read_text(encoding="utf-8"))
    assert report["n"] == 200
    assert report["metrics"]["base"]["reference perplexity"]["n"] == 200
    print(f"{wall:.1f} s, load {os.getloadavg()[0]:.1f}")
    assert wall < LIMIT, f"{wall:.1f} s; load {os.getloadavg()[0]:.1f}: other work on these cores?"
