"""Makes the parts of scripts/make_bundled_model.py importable as `bundled_model`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
