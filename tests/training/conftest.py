"""Makes `training_jobs` importable for the tests beside it, and its fixture known."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from training_jobs import job_in  # noqa: E402, F401
