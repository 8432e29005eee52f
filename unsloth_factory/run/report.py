"""The report page of a run: one self-contained HTML file, made only from the files of the run folder."""

from __future__ import annotations

import base64
import json
from itertools import islice
from pathlib import Path
from typing import Any

from unsloth_factory.run.atomic import write_text
from unsloth_factory.run.folder import RunFolder

SAMPLES = 8
ASSETS = Path(__file__).resolve().parent.parent / "assets"


def write_report(folder: RunFolder, path: Path, summary: dict[str, Any]) -> Path:
    """Render report.html.

    Args:
        folder: The run folder; what a stage has not written is left out of the page.
        path: Page to write.
        summary: Contents of summary.json.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.jinja").render(
        title=folder.path.name,
        manifest=folder.read(),
        summary=summary,
        validation=_json(folder.validation_results / "validation.json"),
        samples=_samples(folder.validation_results / "samples.jsonl"),
        files=file_table(summary),
        benchmarks={
            path.stem: _json(path)
            for path in sorted(folder.evaluation_results.glob("*.json"))
            if "submission" not in path.name
        },
        plot=_image(folder.loss_plot),
        generations=_generations(folder.generations),
        general=_general_loss(folder.metrics),
    )
    return write_text(path, page)


def file_table(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model in the order of the chain: base, tuned, 16-bit GGUF, quantised files by size."""
    rows = [
        {"name": label, "accuracy": summary.get(f"{key}_accuracy"), "bytes": summary.get(f"{key}_bytes")}
        for key, label in (("base", "base"), ("tuned", "tuned"), ("f16", "GGUF f16"), ("bf16", "GGUF bf16"))
        if summary.get(f"{key}_accuracy") is not None or summary.get(f"{key}_bytes")
    ]
    quantized = sorted(summary["quantized"].items(), key=lambda item: -item[1]["bytes"])
    return rows + [{"name": f"GGUF {kind}", **entry} for kind, entry in quantized]


def _samples(path: Path) -> list[dict[str, Any]]:
    """A few questions with both answers, spread over the file."""
    records = _json_lines(path)
    return list(islice(records[:: max(1, len(records) // SAMPLES)], SAMPLES))


def _generations(path: Path) -> dict[str, Any]:
    """Answers at the first and at the last look of the training: {"first": step, "last": step, "rows": [...]}."""
    records = _json_lines(path)
    if not records:
        return {}
    first, last = records[0]["step"], records[-1]["step"]
    before = {(record["source"], record["prompt"]): record for record in records if record["step"] == first}
    after = [record for record in records if record["step"] == last]
    step = max(1, len(after) // SAMPLES)
    rows = [
        {"first": before.get((record["source"], record["prompt"])), "last": record}
        for record in islice(after[::step], SAMPLES)
    ]
    return {"first": first, "last": last, "rows": rows}


def _general_loss(path: Path) -> dict[str, float]:
    """Loss on general questions before and after the training, per token; empty where it was not measured."""
    measured = [line for line in _json_lines(path) if line.get("general_loss") is not None]
    if not measured or measured[-1].get("general_loss_start") is None:
        return {}
    return {"before": measured[-1]["general_loss_start"], "after": measured[-1]["general_loss"]}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    # not splitlines(): an answer may hold U+2028
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return [json.loads(line) for line in lines if line]


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _image(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode("ascii") if path.is_file() else ""
