"""What quantising costs, shown: a table on the terminal, Markdown, and one self-contained HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from unsloth_factory.config.settings import GateMeasure
from unsloth_factory.evaluation.pages import ASSETS, markdown_table
from unsloth_factory.evaluation.quality.gate import MEASURES, FileQuality, Value

MIB = 2**20
WIDTH, HEIGHT = 430, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 20, 16, 34
"""Margins of a plot, for its axes' numbers."""


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """All files of one measurement, the largest first."""

    model: str
    engine: str
    source: str
    """Where the answers come from."""
    answers: int
    tokens: int
    reference: str
    """Name of the 16-bit file."""
    files: tuple[FileQuality, ...]
    gate: float | None = None
    measure: GateMeasure = "kl"
    picked: str | None = None

    @property
    def gate_words(self) -> str:
        """The gate in words."""
        return f"{MEASURES[self.measure]} of at most {self.gate:g} (upper end of its 95 % interval)"

    @property
    def verdict(self) -> str:
        """What came of the gate; empty without one."""
        if self.gate is None:
            return ""
        if self.picked is None:
            return f"No file has a {self.gate_words}."
        return f"Picked {self.picked}: the smallest file with a {self.gate_words}."

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def quality_table(report: QualityReport) -> Table:
    """One row a file. Fits 80 columns; the JSON file has every digit."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(_short_head(report)):
        table.add_column(column, justify="right" if number else "left")
    for file in report.files:
        values = file.values
        row = [_named(file, report), f"{file.bytes / MIB:,.1f}", _large(values["perplexity"].value)]
        if file.losses:
            row += [
                with_error(_percent_rise(values["perplexity ratio"]), 2),
                _small(values["mean KL"]),
                f"{values['99 % KL'].value:.3g}",
                f"{values['same top token'].value:.1%}",
            ]
        else:
            row += ["", "", "", ""]
        style = {True: "green", False: "red"}.get(file.passed) if file.passed is not None else None
        table.add_row(*row, *([_judged(file)] if report.gate is not None else []), style=style)
    return table


def _short_head(report: QualityReport) -> list[str]:
    head = ["file", "MiB", "ppl", "rise %", "mean KL", "99 % KL", "same top"]
    return head + (["gate"] if report.gate is not None else [])


def _named(file: FileQuality, report: QualityReport) -> str:
    return f"{file.name} *" if file.name == report.picked else file.name


def _judged(file: FileQuality) -> str:
    return {True: "passes", False: "fails", None: ""}[file.passed]


def _percent_rise(ratio: Value) -> Value:
    return Value(100 * (ratio.value - 1), None if ratio.error is None else 100 * ratio.error)


def with_error(value: Value, digits: int) -> str:
    """Number ± its standard error."""
    error = "" if value.error is None else f"±{value.error:.{digits}f}"
    return f"{value.value:.{digits}f}{error}"


def _large(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.1f}" if value < 1000 else f"{value:.3g}"


def _small(value: Value) -> str:
    """A KL divergence: its first digits, however small, and the first of its error."""
    shown = f"{value.value:.3g}" if value.value >= 1e-3 else f"{value.value:.2g}"
    return shown if value.error is None else f"{shown}±{value.error:.1g}"


def markdown_page(report: QualityReport) -> str:
    """Table and verdict, for a merge request."""
    return "\n".join(_markdown(report)) + "\n"


def _markdown(report: QualityReport) -> Iterator[str]:
    yield f"# What quantising costs: {report.model}\n"
    yield f"{report.tokens:,} tokens of {report.answers:,} held-out answers ({report.source}), {report.engine}."
    yield f"Compared with the {report.reference} file; ± standard error, the tokens of one answer taken together.\n"
    if report.verdict:
        yield f"**{report.verdict}**\n"
    yield from markdown_table(page_head(report), page_rows(report))
    yield "\n## Files\n"
    yield from markdown_table(["", "file", "SHA-256"], ([file.name, file.path, file.sha256] for file in report.files))


def page_head(report: QualityReport) -> list[str]:
    """Columns of the pages' table."""
    head = ["file", "MiB", "perplexity", "rise %", "mean KL", "99 % KL", "max KL", "same top %"]
    return [*head, "right %", "RMS Δp", *(["gate"] if report.gate is not None else [])]


def page_rows(report: QualityReport) -> Iterator[list[str]]:
    """Rows of the pages' table, every number with its standard error."""
    for file in report.files:
        values = file.values
        row = [_named(file, report), f"{file.bytes / MIB:,.1f}", with_error(values["perplexity"], 2)]
        if file.losses:
            row += [
                with_error(_percent_rise(values["perplexity ratio"]), 2),
                *(_small(values[name]) for name in ("mean KL", "99 % KL")),
                _small(values["max KL"]),
                with_error(_percent(values["same top token"]), 1),
                with_error(_percent(values["right tokens"]), 1),
                with_error(values["RMS probability change"], 3),
            ]
        else:
            row += [*[""] * 5, with_error(_percent(values["right tokens"]), 1), ""]
        yield row + ([_judged(file)] if report.gate is not None else [])


def _percent(value: Value) -> Value:
    return Value(100 * value.value, None if value.error is None else 100 * value.error)


def html_page(report: QualityReport) -> str:
    """The page, with nothing to fetch from elsewhere."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("quality.html.jinja").render(
        report=report,
        head=page_head(report),
        rows=list(page_rows(report)),
        plots=[
            _plot(report, "kl", "mean KL, nats a token", 1.0),
            _plot(report, "perplexity", "rise of perplexity, %", 100.0),
        ],
        width=WIDTH,
        height=HEIGHT,
    )


@dataclass(frozen=True)
class _Axis:
    """From values to pixels; a logarithmic one has `low` above 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, low))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [(self.at(10.0**power), f"{10.0**power:g}") for power in powers]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        first = math.ceil(self.low / step - 1e-9)
        steps = range(first, math.floor(self.high / step + 1e-9) + 1)
        return [(self.at(step * number), f"{step * number:g}") for number in steps]


def _plot(report: QualityReport, measure: GateMeasure, title: str, factor: float) -> dict[str, Any]:
    """Everything that the page draws: loss over file size, with 95 % intervals, and the gate where it is this one."""
    files = [file for file in report.files if file.losses]
    losses = [file.losses[measure] for file in files]
    gate = report.gate * factor if report.gate is not None and report.measure == measure else None
    spans = [[factor * (loss.value + sign * (loss.upper - loss.value)) for sign in (-1, 0, 1)] for loss in losses]
    sizes = [file.bytes / MIB for file in files]
    room = 0.25 * (max(sizes) - min(sizes)) or 0.25 * max(sizes)
    x = _Axis(max(0.0, min(sizes) - room), max(sizes) + 1.5 * room, LEFT, WIDTH - RIGHT)  # names stand on the right
    y = _vertical(spans, gate, log=measure == "kl" and all(loss.value > 0 for loss in losses))
    points = [
        {
            "name": file.name,
            "x": x.at(file.bytes / MIB),
            "low": y.at(span[0]),
            "y": y.at(span[1]),
            "high": y.at(span[2]),
            "colour": {True: "good", False: "bad", None: "plain"}[file.passed if gate is not None else None],
            "picked": file.name == report.picked,
        }
        for file, span in zip(files, spans, strict=True)
    ]
    return {
        "title": title,
        "points": points,
        "x_ticks": x.ticks(),
        "y_ticks": y.ticks(),
        "zero": None if y.log else y.at(0.0),
        "gate": None if gate is None else y.at(gate),
        "gate_label": "" if gate is None else f"gate {gate:g}",
        "box": {"left": LEFT, "right": WIDTH - RIGHT, "top": TOP, "bottom": HEIGHT - BOTTOM},
    }


def _vertical(spans: Sequence[Sequence[float]], gate: float | None, *, log: bool) -> _Axis:
    """An axis that holds every interval and the gate; a logarithmic one starts and ends at a power of ten."""
    highs = [span[2] for span in spans] + ([gate] if gate is not None else [])
    if log:
        lows = [max(span[0], span[1] / 10) for span in spans] + ([gate] if gate is not None else [])
        low, high = 10.0 ** math.floor(math.log10(min(lows))), 10.0 ** math.ceil(math.log10(max(highs)))
        return _Axis(low, high if high > low else 10 * low, HEIGHT - BOTTOM, TOP, log=True)
    low, high = min(0.0, *(span[0] for span in spans)), max(0.0, *highs)
    room = 0.08 * (high - low) or 1.0
    return _Axis(low - (room if low < 0 else 0.0), high + room, HEIGHT - BOTTOM, TOP)
