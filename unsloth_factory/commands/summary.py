"""What a plan leaves for people and for scripts: summary.json and report.html, from the files of the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from unsloth_factory.run.atomic import read_sums, write_json
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.run.report import write_report

HEADLINE = "exact match"


def write_summary(folder: RunFolder, root: Path, stage_seconds: dict[str, float], seconds: float) -> dict[str, Any]:
    """Collect the figures of all stages, write summary.json and report.html into `root`, and print them.

    Args:
        folder: Run folder that the last stages worked on.
        root: The plan's output folder (the same unless the plan trains twice).
        stage_seconds: Seconds of each stage, also of those that were skipped this time.
        seconds: Wall time of this run.
    """
    summary = collect(folder) | {"seconds": round(seconds, 1), "stage_seconds": stage_seconds}
    write_json(root / "summary.json", summary)
    write_report(folder, root / "report.html", summary)
    print_summary(summary, root)
    return summary


def collect(folder: RunFolder) -> dict[str, Any]:
    """The figures that the run folder holds; a stage that did not run leaves its key out."""
    validation = _json(folder.validation_results / "validation.json")
    files = _json(folder.validation_results / "gguf.json")
    parity = _json(folder.gguf / "parity.json")
    merge = _json(folder.merged_model / "merge.json")
    summary: dict[str, Any] = {}
    for variant, metrics in validation.get("metrics", {}).items():
        summary[f"{variant}_accuracy"] = metrics[HEADLINE]["value"]
    if validation:
        summary["questions"] = validation["n"]
    sums = read_sums(folder.gguf)
    quantized = {}
    for path in sorted(folder.gguf.glob("*.gguf")):
        kind = path.stem.rsplit("-", 1)[-1]
        score = _score(files, kind, sums.get(path.name))
        if kind in ("f16", "bf16", "f32"):
            summary[f"{kind}_accuracy"] = score
            summary[f"{kind}_bytes"] = path.stat().st_size
        else:
            quantized[kind] = {"accuracy": score, "bytes": path.stat().st_size}
    summary["quantized"] = quantized
    if folder.picked_file.is_file():
        summary["picked"] = _json(folder.picked_file)["file"]
    summary["merge_max_abs_logit_diff"] = merge.get("max_abs_logit_diff")
    summary["token_parity"] = parity.get("token_parity")
    benchmarks = [path for path in folder.evaluation_results.glob("*.json") if "submission" not in path.name]
    summary["benchmarks"] = {path.stem: _benchmark(_json(path)) for path in sorted(benchmarks)}
    return summary


def _score(files: dict[str, Any], kind: str, digests: set[str] | None) -> float | None:
    """What `uf validate --gguf` measured of a file; None if that was another file of its name."""
    measured = files.get("model", {}).get("gguf", {}).get(kind, {}).get("sha256")
    if kind not in files.get("metrics", {}) or (measured and digests and measured not in digests):
        return None
    return float(files["metrics"][kind][HEADLINE]["value"])


def _benchmark(report: dict[str, Any]) -> dict[str, Any]:
    name = report["headline"]
    return {"metric": name, "questions": report["n"]} | {
        variant: metrics[name]["value"] for variant, metrics in report["metrics"].items()
    }


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def print_summary(summary: dict[str, Any], root: Path) -> None:
    """The scores before and after, the size of every file, and where the page is."""
    console = Console()
    table = Table(title="Before and after", title_justify="left")
    table.add_column("model")
    table.add_column("exact answers", justify="right")
    table.add_column("size", justify="right")
    for name, label in (("base", "base"), ("tuned", "tuned"), ("f16", "GGUF f16"), ("bf16", "GGUF bf16")):
        if summary.get(f"{name}_accuracy") is not None:
            size = summary.get(f"{name}_bytes")
            table.add_row(label, f"{summary[f'{name}_accuracy']:.1%}", f"{size / 2**20:.1f} MiB" if size else "")
    for kind, entry in summary["quantized"].items():
        picked = str(summary.get("picked")).endswith(f"-{kind}.gguf")
        kind = f"{kind} (picked by the gate)" if picked else kind
        score = "" if entry["accuracy"] is None else f"{entry['accuracy']:.1%}"
        table.add_row(f"GGUF {kind}", score, f"{entry['bytes'] / 2**20:.1f} MiB")
    if table.row_count:
        console.print(table)
    console.print(f"{summary['seconds']:.0f} s. Figures: {root / 'summary.json'}\nReport:  {root / 'report.html'}",
                  highlight=False, soft_wrap=True)  # fmt: skip
