"""How cost grows with length and depth: a plot and Markdown tables of what `engine.py lengths` has written."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "engine-lengths.png"
NAMES = {
    "fast": "uf, engine fast", "standard": "uf, engine standard", "unsloth": "Unsloth",
    "transformers": "transformers + peft + bitsandbytes", "liger": "the same with Liger",
}  # fmt: skip
COLORS = {
    "fast": "tab:blue", "standard": "tab:green", "unsloth": "tab:orange", "transformers": "tab:gray",
    "liger": "tab:purple",
}  # fmt: skip
DEFAULT_SETTINGS = ("planner", "checkpointing", "checkpointing: checkpointing")
Line = dict[str, Any]


def run(path: Path, target: Path = TARGET) -> None:
    """Draw a file of JSON lines into `target`, print its tables."""
    lines = read(path)
    draw(lines, target)
    print(lengths_table(lines))
    print()
    print(longest_table(lines))
    layers = layers_table(lines)
    print("\n" + layers if layers else "")
    print(f"{target}")


def read(path: Path) -> list[Line]:
    """The lines of `lengths`; of a figure that was taken twice the later one."""
    found: dict[tuple[Any, ...], Line] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        line = json.loads(text) if text.startswith("{") else {}
        if line.get("what") in ("load", "lengths", "longest"):
            key = tuple(line.get(name) for name in ("what", "model", "rival", "setting", "dtype", "layers", "tokens"))
            if line["what"] != "lengths":
                key = key[:-1]
            found.pop(key, None)
            found[key] = line
    return list(found.values())


def curves(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Label -> lines by length, of the deepest model alone."""
    measured = [line for line in lines if line["what"] == "lengths"]
    deepest = max((line["layers"] for line in measured), default=0)
    by_label: dict[str, list[Line]] = {}
    for line in measured:
        if line["layers"] == deepest:
            by_label.setdefault(label(line), []).append(line)
    return {name: sorted(of, key=lambda line: line["tokens"]) for name, of in by_label.items()}


def label(line: Line) -> str:
    """Who was measured, and how where that is not the usual."""
    words = [NAMES.get(line["rival"], line["rival"])]
    words += [] if line["setting"] in DEFAULT_SETTINGS else [line["setting"]]
    words += ["float16"] if line.get("dtype") == "float16" else []
    return ", ".join(words)


def draw(lines: Sequence[Line], target: Path) -> None:
    """Tokens a second and memory against length, a cross where memory ran out; below, if measured, against layers."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depths = by_depth(lines)
    figure = Figure(figsize=(12, 10 if depths else 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    rows = figure.subplots(2 if depths else 1, 2, squeeze=False)
    panels = rows[0]
    titles = ("tokens a second", "memory of the GPU, GiB reserved")
    for axes, key, title in zip(panels, ("tokens_per_second", "peak_gib"), titles, strict=True):
        for name, of in curves(lines).items():
            _curve(axes, name, of, key)
        axes.set_xscale("log", base=2)
        ticks = sorted({line["tokens"] for of in curves(lines).values() for line in of})
        axes.set_xticks(ticks, [short(tokens) for tokens in ticks])
        axes.set(title=title, xlabel="tokens of one sequence")
        axes.grid(alpha=0.3)
    caps = {line["cap_gib"] for of in curves(lines).values() for line in of if line["cap_gib"]}
    for gib in caps:
        panels[1].axhline(gib, color="black", linestyle=":", linewidth=1, label=f"limit, {gib} GiB")
    if depths:
        _against_layers(rows[1], depths)
    for axes in rows.flat:
        axes.set_ylim(bottom=0)
        axes.legend(loc="best", fontsize=8)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    target.write_bytes(buffer.getvalue())


def _curve(axes: Any, name: str, lines: Sequence[Line], key: str) -> None:
    fits = [line for line in lines if line.get("tokens_per_second")]
    dashed = lines[0]["setting"] not in DEFAULT_SETTINGS
    color = COLORS.get(lines[0]["rival"], "black")
    axes.plot(
        [line["tokens"] for line in fits], [line[key] for line in fits], "s--" if dashed else "o-", color=color,
        markersize=4, label=name,
    )  # fmt: skip
    ends = [line["tokens"] for line in lines if not line.get("tokens_per_second")]
    if ends:
        height = fits[-1][key] if fits else 0
        axes.plot(ends[:1], [height], "x", color=color, markersize=9, markeredgewidth=2, label=f"{name}: out of memory")


def by_depth(lines: Sequence[Line]) -> dict[tuple[str, int], list[Line]]:
    """(label, tokens) -> lines by layers, of what was measured at more than one depth."""
    found: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        if line["what"] == "lengths" and line.get("tokens_per_second"):
            found.setdefault((label(line), line["tokens"]), []).append(line)
    ordered = {key: sorted(of, key=lambda line: line["layers"]) for key, of in found.items()}
    return {key: of for key, of in ordered.items() if len({line["layers"] for line in of}) > 1}


def _against_layers(panels: Sequence[Any], depths: dict[tuple[str, int], list[Line]]) -> None:
    """Microseconds a token, which should be a straight line, and memory."""
    for number, ((name, tokens), of) in enumerate(depths.items()):
        layers = [line["layers"] for line in of]
        microseconds, memory = [1e6 / line["tokens_per_second"] for line in of], [line["peak_gib"] for line in of]
        for axes, values in zip(panels, (microseconds, memory), strict=True):
            style = ("o-", "s--", "^:", "v-.")[number % 4]
            color = COLORS.get(of[0]["rival"], "black")
            axes.plot(layers, values, style, color=color, markersize=4, label=f"{name}, {tokens:,} tokens")
    for axes, title in zip(panels, ("microseconds a token", "memory of the GPU, GiB reserved"), strict=True):
        axes.set(title=title, xlabel="layers")
        axes.set_xticks(sorted({line["layers"] for of in depths.values() for line in of}))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)


def short(tokens: int) -> str:
    """512, 1k, 1.5k"""
    return str(tokens) if tokens < 1024 else f"{tokens / 1024:g}k"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _cell(line: Line | None) -> str:
    if line is None:
        return "-"
    if not line.get("tokens_per_second"):
        return "out of memory"
    return f"{line['tokens_per_second']:,} ({line['peak_gib']:.1f})"


def lengths_table(lines: Sequence[Line]) -> str:
    """A row a length, a column each that was measured."""
    found = curves(lines)
    lengths = sorted({line["tokens"] for of in found.values() for line in of})
    by_length = {name: {line["tokens"]: line for line in of} for name, of in found.items()}
    rows = [[f"{tokens:,}", *(_cell(of.get(tokens)) for of in by_length.values())] for tokens in lengths]
    return _markdown(["tokens/s (GiB reserved) of one sequence of", *found], rows)


def longest_table(lines: Sequence[Line]) -> str:
    """The longest sequence of each, and what came before the first step."""
    names = [label(line) for line in lines if line["what"] == "load"]
    rows = []
    for name in dict.fromkeys(names):
        own = {line["what"]: line for line in lines if label(line) == name and line["what"] != "lengths"}
        load, longest = own["load"], own.get("longest", {})
        ends = (f"{longest[key]:,}" if longest.get(key) else "-" for key in ("tokens", "too_long"))
        times = (f"{load[key]:.1f}" for key in ("imports_s", "loaded_s", "first_step_s"))
        rows.append([name, *ends, *times, *(f"{load[key]:.2f}" for key in ("load_gib", "host_anon_gib"))])
    head = ["who", "longest that fits", "too long", "s to imports done", "s to model loaded", "s to first step"]
    return _markdown([*head, "GiB reserved while loading", "GiB of host RAM (RssAnon)"], rows)


def layers_table(lines: Sequence[Line]) -> str:
    """A row a depth and length, a column each that was measured; empty where only one depth was."""
    measured = [line for line in lines if line["what"] == "lengths" and line["setting"] in DEFAULT_SETTINGS]
    depths = sorted({line["layers"] for line in measured})
    if len(depths) < 2:
        return ""
    names = list(dict.fromkeys(label(line) for line in measured))
    lengths = sorted({line["tokens"] for line in measured if line["layers"] == depths[0]})
    at = {(label(line), line["layers"], line["tokens"]): line for line in measured}
    rows = [
        [str(layers), f"{tokens:,}", *(_cell(at.get((name, layers, tokens))) for name in names)]
        for tokens in lengths
        for layers in depths
    ]
    return _markdown(["layers", "tokens", *(f"{name}: tokens/s (GiB)" for name in names)], rows)
