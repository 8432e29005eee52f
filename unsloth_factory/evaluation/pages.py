"""A report as a page: a validation as one self-contained HTML file, any report as Markdown for a merge request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.evaluation.compare.agreement import agreement_lines
from unsloth_factory.evaluation.report import EvalReport
from unsloth_factory.evaluation.rows import plain_name, silent_faults, table_rows

ASSETS = Path(__file__).resolve().parent.parent / "assets"
LONGEST_CELL = 300
"""Characters of an answer in the Markdown; the page and the JSON have all of it."""


def html_page(report: EvalReport) -> str:
    """The page, with nothing to fetch from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("validation.html.jinja").render(
        report=report,
        title=_title(report),
        variants=list(report.metrics),
        rows=table_rows(report),
        silent=[plain_name(name) for name in silent_faults(report)],
        details=report.details,
        settings=_settings(report),
    )


def markdown_page(report: EvalReport) -> str:
    """The same in Markdown; long answers are shortened."""
    return "\n".join(_markdown(report)) + "\n"


def _title(report: EvalReport) -> str:
    name = str(report.model.get("adapter") or report.model.get("model") or "")
    task = report.task.capitalize() if report.task == "validation" else report.task
    return f"{task} of {name}" if name else task


def _settings(report: EvalReport) -> str:
    known = {**report.model, **report.settings}
    said = {key: value for key, value in known.items() if value not in (None, "", []) and not isinstance(value, dict)}
    parts = [f"{key.replace('_', ' ')} {value}" for key, value in said.items()]
    return "; ".join(parts)


def _markdown(report: EvalReport) -> Iterator[str]:
    variants = list(report.metrics)
    yield f"# {_title(report)}\n\n{report.n:,} questions. {_settings(report)}\n"
    for cause in report.details.get("causes", []):
        yield f"- **Likely cause: {cause['name']}.** {cause['evidence']}. What to do: {cause['advice']}."
    yield ""
    compared = bool(report.comparisons)
    head = ["metric", *variants, *(["difference", "95 % interval", "verdict"] if compared else [])]
    yield from markdown_table(head, (_markdown_row(row, compared) for row in table_rows(report)))
    silent = silent_faults(report)
    if silent:
        yield f"\nIn no answer: {', '.join(map(plain_name, silent))}."
    yield from (f"\nNote: {note}" for note in report.notes)
    files = report.model.get("gguf", {})
    if files:
        yield "\n## Files\n"
        rows = ([name, file["path"], f"{file['bytes'] / 2**20:.1f}", file["sha256"]] for name, file in files.items())
        yield from markdown_table(["", "file", "MiB", "SHA-256"], rows)
    yield from (f"\n{line}" for line in agreement_lines(report))
    for variant, scores in report.details.get("corpus", {}).items():
        yield f"\nCorpus, {variant}: BLEU-4 {scores['bleu']:.2f} (`{scores['bleu_signature']}`), "
        yield f"chrF {scores['chrf']:.2f} (`{scores['chrf_signature']}`)"
    fields = report.details.get("json_fields", {})
    if fields:
        yield "\n## JSON fields\n"
        rows = ([name, str(row["n"]), *(f"{row[variant]:.3f}" for variant in variants)] for name, row in fields.items())
        yield from markdown_table(["field", "references", *variants], rows)
    worst = [sample for sample in report.details.get("worst", []) if sample["problems"]]
    if worst:
        yield "\n## Worst answers\n"
        keys = ["source", "problems", "question", "reference", *variants]
        yield from markdown_table(keys, ([_joined(sample[key]) for key in keys] for sample in worst))


def _markdown_row(row: Any, compared: bool) -> list[str]:
    name = f"**{row.name}**" if row.headline else row.name
    verdict = f"**{row.verdict}**" if row.verdict in ("worse", "better") else row.verdict
    if compared:
        return [name, *row.values, row.delta, row.interval, verdict]
    return [
        name,
        *(f"{value} ± {error}" if error else value for value, error in zip(row.values, row.errors, strict=True)),
    ]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; bars, tags and fences in the cells are escaped."""
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(_cell(cell) for cell in row) + " |"


def _joined(value: Any) -> str:
    return "; ".join(value) if isinstance(value, list) else str(value)


def _cell(text: str) -> str:
    """On one line, without what Markdown would take for its own: bars, tags and fences."""
    line = " ".join(text.split())
    line = line if len(line) <= LONGEST_CELL else line[: LONGEST_CELL - 1] + "…"
    return re.sub(r"([|<>`])", r"\\\1", line)
