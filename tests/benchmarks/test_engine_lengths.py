"""The benchmark of lengths and loads: what happens when memory runs out, and what is drawn of its lines."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import engine, engine_lengths, engine_plot, engine_rivals
from benchmarks.engine_models import depth, shortened

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "unsloth_factory" / "assets" / "tiny_model"


class Made:
    """A rival whose memory suffices for some tokens, and after a relief for more."""

    setting, dtype = "planner", torch.bfloat16

    def __init__(self, most: int, relieved: int | None = None) -> None:
        self.usual, self.relieved, self.most = most, relieved, most
        self.seen: list[int] = []
        self.cleaned = 0

    def micro_batch(self, lengths: list[int]) -> None:
        self.seen += lengths
        if sum(lengths) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore words")

    def update(self) -> None:
        pass

    def clean(self) -> None:
        self.cleaned += 1

    def begin(self) -> None:
        self.most = self.usual

    def plan(self, tokens: int) -> dict[str, Any]:
        return {"plan": {"offload": 35, "keep": 1}} if tokens == 8192 else {}

    def reliefs(self) -> list[Any]:
        return [] if self.relieved is None else [lambda: setattr(self, "most", self.relieved)]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """lines(): what has been reported so far."""
    monkeypatch.setenv("OUT", str(tmp_path))
    return lambda: [json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()]


GIVEN = argparse.Namespace(model=Path("qwen3-8b"), rival="fast", cap_gib=14.2, cap=14.2, seconds=0.0)


def test_lengths_end_where_memory_does(lines):
    rival = Made(5000)
    assert engine_lengths.walk(GIVEN, rival, 36, [512, 4096, 8192, 16384]) == (4096, 8192)
    assert 16384 not in rival.seen
    assert [(line["tokens"], line.get("error")) for line in lines()] == [
        (512, None), (4096, None), (8192, "CUDA out of memory. Tried to allocate 1 GiB"),
    ]  # fmt: skip
    assert rival.cleaned >= 1


def test_a_relief_comes_before_giving_up(lines):
    assert engine_lengths.walk(GIVEN, Made(5000, relieved=9000), 36, [4096, 8192, 16384]) == (8192, 16384)
    assert [line["tokens_per_second"] is not None for line in lines()] == [True, True, False]
    assert [line.get("plan") for line in lines()] == [None, {"offload": 35, "keep": 1}, None]


def test_another_failure_costs_one_length(lines, capsys):
    rival = Made(10**6)
    rival.update = lambda: 1 // 0
    assert engine_lengths.walk(GIVEN, rival, 36, [512, 1024]) == (None, 512)
    assert lines()[0]["error"].startswith("ZeroDivisionError")
    assert "1 // 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("most", "fitted", "failed", "tokens", "too_long"),
    [
        (20_000, 16384, 24576, 19968, 20480),
        (24_064, 16384, 24576, 24064, 24576),
        (39_000, 32768, None, 38912, 39424),
        (50_000, 32768, None, 40960, None),
        (100, None, 512, 0, 512),
    ],
)
def test_the_longest_that_fits(lines, most, fitted, failed, tokens, too_long):
    rival = Made(most)
    engine_lengths._longest(GIVEN, rival, 36, fitted, failed, 40960)
    assert (lines()[-1]["tokens"], lines()[-1]["too_long"]) == (tokens, too_long)
    assert len(rival.seen) <= 5


def test_bisect_stops_after_its_tries():
    tried: list[int] = []
    assert engine_lengths.bisect(lambda tokens: bool(tried.append(tokens)), 512, 512 * 1025) == (512, 512 * 33)
    assert tried == [512 * n for n in (513, 257, 129, 65, 33)]


def test_fewer_layers_of_the_same_file(tmp_path):
    folder = shortened(TINY, 2, tmp_path)
    assert depth(folder) == 2
    assert (folder / "model.safetensors").samefile(TINY / "model.safetensors")
    assert shortened(TINY, 4, tmp_path) == TINY


WORDS = ["--tokens", "64,96", "--layers", "2,1", "--seconds", "0.01"]


def check(told: list[dict[str, Any]]) -> None:
    assert [(line["what"], line.get("layers"), line.get("tokens")) for line in told] == [
        ("load", 2, None), ("lengths", 2, 64), ("lengths", 2, 96), ("lengths", 1, 64), ("lengths", 1, 96),
        ("end", None, None),
    ]  # fmt: skip
    load = told[0]
    assert 0 < load["imports_s"] <= load["loaded_s"] <= load["first_step_s"]
    assert 0.05 < load["load_host_anon_gib"] <= load["host_anon_gib"] < 8
    assert all(line["tokens_per_second"] > 0 and line["model"] == "tiny_model" for line in told[1:-1])


def test_the_command_runs_through(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "lengths", str(TINY), str(tmp_path)]
    environment = os.environ | {"OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "--rival", "fast", *WORDS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check([json.loads(line) for line in (tmp_path / "engine.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("rival", ["standard", "transformers"])
def test_the_others_run_through(rival, tmp_path, lines):
    engine_lengths.measure(engine.parser().parse_args(["lengths", str(TINY), str(tmp_path), "--rival", rival, *WORDS]))
    check(lines())


def test_the_peak_of_host_memory_is_seen():
    watch = engine_lengths.HostMemory()
    watch.start()
    before = watch.gib()
    block = torch.ones(2**27)
    del block
    assert watch.gib() - before > 0.3


def made_lines() -> list[dict[str, Any]]:
    """As `lengths` writes them, of two rivals."""
    told: list[dict[str, Any]] = []
    for rival, setting, speed, last in (
        ("fast", "planner", 15_000, 24576),
        ("unsloth", "checkpointing: checkpointing", 9_000, 8192),
    ):
        facts = {"model": "qwen3-8b", "rival": rival, "cap_gib": 14.2, "setting": setting, "dtype": "bfloat16"}
        told.append(facts | {
            "what": "load", "layers": 36, "imports_s": 8.0, "loaded_s": 17.25, "first_step_s": 21.0, "load_gib": 6.1,
            "host_anon_gib": 3.25,
        })  # fmt: skip
        for tokens in engine_lengths.LENGTHS:
            line = facts | {"what": "lengths", "layers": 36, "tokens": tokens, "tokens_per_second": None}
            if tokens > last:
                told.append(line | {"error": "CUDA out of memory"})
                break
            told.append(line | {"tokens_per_second": speed - tokens // 8, "peak_gib": 6 + tokens / 4096})
        told.append(facts | {"what": "longest", "layers": 36, "tokens": last + 512, "too_long": last + 1024})
        told.append(
            facts | {"what": "lengths", "layers": 9, "tokens": 2048, "tokens_per_second": 4 * speed, "peak_gib": 3.0}
        )
    return told


def written(path: Path, told: list[dict[str, Any]]) -> Path:
    path.write_text("a word of some library\n" + "".join(json.dumps(line) + "\n" for line in told))
    return path


def test_plot_and_tables(tmp_path, capsys):
    engine_plot.run(written(tmp_path / "lines.jsonl", made_lines()), tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| 512 | 14,936 (6.1) | 8,936 (6.1) |" in printed
    assert "| 12,288 | 13,464 (9.0) | out of memory |" in printed
    assert "| 32,768 | out of memory | - |" in printed
    assert "| Unsloth | 8,704 | 9,216 | 8.0 | 17.2 | 21.0 | 6.10 | 3.25 |" in printed
    assert "| 9 | 2,048 | 60,000 (3.0) | 36,000 (3.0) |" in printed
    assert "| 36 | 2,048 | 14,744 (6.5) | 8,744 (6.5) |" in printed


def test_of_a_figure_taken_twice_the_later_counts(tmp_path):
    again = [line | {"tokens_per_second": 1, "peak_gib": 1.0} for line in made_lines() if line.get("tokens") == 512]
    found = engine_plot.read(written(tmp_path / "lines.jsonl", made_lines() + again))
    assert len(found) == len(made_lines())
    assert [line["tokens_per_second"] for line in found if line.get("tokens") == 512] == [1, 1]


def test_depths_are_drawn_where_there_are_several(tmp_path):
    lines = made_lines()
    found = engine_plot.by_depth(lines)
    assert {key: [line["layers"] for line in of] for key, of in found.items()} == {
        ("uf, engine fast", 2048): [9, 36],
        ("Unsloth", 2048): [9, 36],
    }
    panels = Figure().subplots(1, 2)
    engine_plot._against_layers(panels, found)
    assert list(panels[0].lines[0].get_ydata()) == [pytest.approx(1e6 / 60_000), pytest.approx(1e6 / 14_744)]
    assert list(panels[1].lines[0].get_ydata()) == [3.0, 6.5]
    assert engine_plot.by_depth([line for line in lines if line.get("layers") == 36]) == {}


def test_a_curve_ends_in_a_cross(tmp_path):
    axes = Figure().subplots()
    of = engine_plot.curves(made_lines())["Unsloth"]
    engine_plot._curve(axes, "Unsloth", of, "peak_gib")
    line, cross = axes.lines
    assert list(line.get_xdata()) == [512, 1024, 2048, 4096, 8192]
    assert (cross.get_marker(), list(cross.get_xdata()), list(cross.get_ydata())) == ("x", [12288], [8.0])


def test_dtypes(monkeypatch):
    assert engine_rivals.dtype_of(argparse.Namespace(dtype="float16")) == torch.float32  # no GPU here
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = [engine_rivals.dtype_of(argparse.Namespace(dtype=name)) for name in ("auto", "float16", "bfloat16")]
    assert found == [torch.bfloat16, torch.float16, torch.bfloat16]
