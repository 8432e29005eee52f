"""The report page shows what a training's files hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unsloth_factory.run.folder import RunFolder, RunManifest
from unsloth_factory.run.report import write_report

SUMMARY: dict[str, Any] = {
    "stage_seconds": {"sft": 5},
    "quantized": {},
    "merge_max_abs_logit_diff": None,
    "token_parity": None,
    "questions": 0,
}


def page(folder: Path, records: list[dict[str, Any]], metrics: list[dict[str, Any]]) -> str:
    run = RunFolder(folder)
    run.write(RunManifest(command="sft", model="tiny", base_fingerprint="x"))
    for path, lines in ((run.generations, records), (run.metrics, metrics)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path.write_text(text, encoding="utf-8")
    return write_report(run, run.report, SUMMARY).read_text(encoding="utf-8")


def record(step: int, number: int, answer: str, stopped: bool = True) -> dict[str, Any]:
    question = {"source": f"held.jsonl:{number}", "prompt": f"问题{number}<b>", "reference": f"参考{number}"}
    return {"step": step} | question | {"answer": answer, "stopped": stopped}


def test_first_and_last_answers_side_by_side(tmp_path: Path) -> None:
    records = [
        record(0, 1, "早\u2028先"),
        record(0, 2, "早二"),
        record(5, 1, "中间"),
        record(9, 1, "晚", stopped=False),
    ]
    html = page(tmp_path, records, [])
    row = html[html.index("问题1") : html.index("参考1")]
    assert row.index("早\u2028先") < row.index("晚")
    assert "(cut off)" in row
    assert "before step 1" in html
    assert "step 9" in html
    assert "问题1&lt;b&gt;" in html
    assert "中间" not in html
    assert "早二" not in html  # was not asked at the end


def test_general_loss_before_and_after(tmp_path: Path) -> None:
    metrics = [
        {"step": 1}, {"step": 2, "general_loss": 2.2, "general_loss_start": 2.0},
        {"step": 4, "general_loss": 2.25, "general_loss_start": 2.0},
    ]  # fmt: skip
    run = RunFolder(tmp_path)
    run.loss_plot.write_bytes(b"png")
    html = page(tmp_path, [], metrics)
    assert "2.000 before the training, 2.250 after it (+0.250 nats a token)" in html
    assert "Answers while training" not in html


def test_a_run_without_either(tmp_path: Path) -> None:
    html = page(tmp_path, [], [{"step": 1}])
    assert "Answers while training" not in html
    assert "general questions" not in html
