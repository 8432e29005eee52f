"""The loop as a whole: what a run writes, says and returns."""

from __future__ import annotations

import json
from pathlib import Path

from training_jobs import said, samples

from unsloth_factory.training.loop import train


def test_a_run_leaves_everything_behind(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path / "run", eval_items=samples(4, seed=9))
    result = train(job)
    run = job.folder
    assert result.steps == 10
    assert result.adapter_path == run.final_adapter
    print(said(job))
    for path in (run.manifest, run.template, run.validation_split, run.metrics, run.loss_plot):
        assert path.is_file()
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert lines[-1]["loss"] < lines[0]["loss"]
