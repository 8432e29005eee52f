"""`uf demo`: the shipped plan on the bundled model and data, and what it proves."""

from __future__ import annotations

from importlib.resources import as_file, files

from unsloth_factory.commands.run import run_plan
from unsloth_factory.config.commands import DemoConfig


def run(config: DemoConfig) -> int:
    """Run assets/demo/plan.yaml; its summary.json and report.html are the result."""
    with as_file(files("unsloth_factory") / "assets" / "demo") as folder:
        return run_plan(folder / "plan.yaml", config.output_dir)
