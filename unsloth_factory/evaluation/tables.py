"""Reports as printed tables."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from unsloth_factory.evaluation.compare.agreement import agreement_lines
from unsloth_factory.evaluation.report import Comparison, EvalReport, Metric
from unsloth_factory.evaluation.rows import plain_name, silent_faults, table_rows

MANY_SUBJECTS = 12
"""More subjects than this are only in the JSON file."""
MANY_VARIANTS = 4
"""More variants than this do not stand side by side in 80 columns."""
SHOWN_METRICS = 4


def print_report(report: EvalReport, console: Console) -> None:
    """Print the metrics, what a benchmark has beyond them, and the notes."""
    if any(report.metrics.values()):
        validation = report.task == "validation"
        error = "± standard error" + ("; differences ± 95 % interval" if report.comparisons else "")
        if validation and report.comparisons:
            error = "differences with 95 % intervals (paired bootstrap), regressions first"
        console.print(f"{report.task}: {report.n:,} questions, {error}", highlight=False, soft_wrap=True)
        for table in delta_tables(report) if validation else [metrics_table(report)]:
            console.print(table)
        console.print(_conclusion(report), highlight=False, soft_wrap=True)
    subjects = report.details.get("subjects", {})
    if 1 < len(subjects) <= MANY_SUBJECTS and len(report.metrics) <= MANY_VARIANTS:
        console.print(_subjects_table(subjects, list(report.metrics)))
    for line in (*_letters(report), *agreement_lines(report)):
        console.print(line, highlight=False, soft_wrap=True)
    silent = silent_faults(report) if report.task == "validation" else []
    if silent:
        console.print(f"in no answer: {', '.join(map(plain_name, silent))}", highlight=False, soft_wrap=True)
    for cause in report.details.get("causes", []):
        line = f"likely cause: {cause['name']}: {cause['evidence']}. What to do: {cause['advice']}"
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def delta_tables(report: EvalReport) -> Iterator[Table]:
    """`delta_table`, a few variants (GGUF files) at a time, so that no metric is left out and none is cut off."""
    for first in range(0, len(report.metrics), MANY_VARIANTS):
        yield delta_table(report, slice(first, first + MANY_VARIANTS))


def delta_table(report: EvalReport, shown: slice = slice(None)) -> Table:
    """A validation's metrics: regressions first, faults that no answer has left out. Fits 80 columns.

    Args:
        report: With the differences between base and tuned, if it has both.
        shown: Which of its variants.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric")
    for variant in list(report.metrics)[shown]:
        table.add_column(variant, justify="right")
    if report.comparisons:
        table.add_column("difference", justify="right")
        table.add_column("95 % interval", justify="right")
        table.add_column("verdict")
    for row in table_rows(report):
        name = f"{row.name} *" if row.headline else row.name
        if report.comparisons:
            style = {"worse": "red", "better": "green"}.get(row.verdict)
            table.add_row(name, *row.values, row.delta, Text(row.interval), row.verdict, style=style)
        else:
            table.add_row(name, *map(_with_error, row.values[shown], row.errors[shown]))
    return table


def _with_error(value: str, error: str) -> str:
    return f"{value}±{error}" if error else value


def metrics_table(report: EvalReport) -> Table:
    """One row a metric: base, tuned, the difference and whether it is one. Fits 80 columns; JSON has every digit."""
    variants = list(report.metrics)
    if len(variants) > MANY_VARIANTS:
        return _variants_table(report)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("metric")
    for variant in variants:
        table.add_column(variant, justify="right")
    if report.comparisons:
        table.add_column("difference", justify="right")
        table.add_column("verdict")
    for row in _rows(report, variants):
        table.add_row(*row)
    return table


def _variants_table(report: EvalReport) -> Table:
    """One row a variant (many GGUF files), with the first metrics; Markdown and JSON have all."""
    first = next(iter(report.metrics.values()))
    names = sorted(first, key=lambda name: name != report.headline)[:SHOWN_METRICS]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in names:
        table.add_column(f"{name} *" if name == report.headline else name, justify="right")
    for variant, metrics in report.metrics.items():
        table.add_row(variant, *(_number(metrics.get(name)) for name in names))
    return table


def _rows(report: EvalReport, variants: list[str]) -> Iterator[list[str]]:
    for name in report.metrics[variants[0]]:
        if not any(report.metrics[variant][name].n for variant in variants if name in report.metrics[variant]):
            continue  # nothing to say: no question had this value
        label = name.removesuffix(" per answer")
        row = [f"{label} *" if name == report.headline else label]
        row += [_number(report.metrics[variant].get(name)) for variant in variants]
        if report.comparisons:
            comparison = report.comparisons.get(name)
            row += [_difference(comparison), _verdict(comparison)] if comparison else ["", ""]
        yield row


def _number(metric: Metric | None) -> str:
    if metric is None or not metric.n:
        return "-"
    digits = _digits(metric.value)
    return f"{metric.value:.{digits}f}±{metric.standard_error:.{digits}f}"


def _difference(comparison: Comparison) -> str:
    low, high = comparison.interval
    digits = min(_digits(comparison.base), _digits(comparison.tuned))
    return f"{comparison.delta:+.{digits}f}±{(high - low) / 2:.{digits}f}"


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 1


def _verdict(comparison: Comparison) -> str:
    return "within error" if comparison.verdict.startswith("no difference") else comparison.verdict


def _conclusion(report: EvalReport) -> str:
    """The headline in words."""
    comparison = report.comparisons.get(report.headline)
    if comparison is None:
        return f"* the metric to quote: {report.headline}" if report.headline else ""
    p_value = "" if comparison.p_value is None else f", p = {comparison.p_value:.3g}"
    verdict = comparison.verdict or "not judged"
    return f"* {report.headline}: {comparison.base:.4f} -> {comparison.tuned:.4f}{p_value}: {verdict}"


def _subjects_table(subjects: dict[str, dict[str, Any]], variants: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("subject", "n", "shots", *variants):
        table.add_column(column, justify="left" if column == "subject" else "right")
    for name, values in subjects.items():
        scores = [f"{values[variant]:.4f}" if variant in values else "-" for variant in variants]
        table.add_row(name, str(values["n"]), str(values["shots"]), *scores)
    return table


def _letters(report: EvalReport) -> Iterator[str]:
    """The sanity lines: how often each letter was chosen, and what a constant answer would score."""
    for variant, counts in report.details.get("chosen_letters", {}).items():
        yield f"letters chosen by {variant}: " + ", ".join(f"{letter} {count}" for letter, count in counts.items())
    constant = report.details.get("always_the_same_letter")
    if constant:
        scores = ", ".join(
            f"{letter} {values['macro']:.4f} / {values['micro']:.4f}" for letter, values in constant.items()
        )
        yield f"always the same letter (macro / micro): {scores}; chance {report.details['chance']:.4f}"


def print_worst(report: EvalReport, console: Console, shown: int = 3) -> None:
    """Print the worst answers with what is wrong with them."""
    for sample in [sample for sample in report.details.get("worst", []) if sample["problems"]][:shown]:
        problems = "; ".join(map(_short, sample["problems"][:3]))
        console.print(f"worst: {sample['source']}: {problems}", style="red", markup=False, soft_wrap=True)
        for name in ("question", "reference", *report.metrics):
            console.print(f"  {name}: {_short(sample[name])}", highlight=False, markup=False, soft_wrap=True)


def _short(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
