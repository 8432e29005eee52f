"""From the start of the process to the first step, then speed and memory of one sequence of each length.

`load` and `lengths` of engine.py run here, in a child process that begins when the files of the model have been read
once, so that they come from the page cache for each rival alike. One load serves everything: the figures of the load,
each length until memory runs out, the longest that fits, and then models of fewer layers.

A length is one sequence a micro-batch, half of its tokens trained. This project's engines run here with their real
decoder, planner, loss and optimizer, but not through `uf sft`: loading once costs less than once a length. When memory
runs out they do what the training loop does then. Each figure is a line of JSON as soon as it is known.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import engine_rivals as rivals
from benchmarks.engine_models import depth, shortened

LENGTHS = (512, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768)
LAYER_LENGTHS = (2048, 8192)
"""Of the models with fewer layers."""
RECOMPUTED_LENGTHS = LENGTHS[:5]
"""Of the run that takes as little memory as can be: at longer ones every layer is recomputed anyway."""
STEP = 512
TRIES = 5
WINDOW_TOKENS, MOST_BATCHES, WINDOWS = 8192, 8, 3
FIRST_TOKENS = 900
WATCH_S = 0.02
CHILD = "UF_BENCHMARK_CHILD"


class HostMemory(threading.Thread):
    """Watches how much anonymous memory this process has at most (RssAnon: without what it maps from files)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.over = threading.Event()

    def run(self) -> None:
        """Look every 20 ms."""
        while not self.over.wait(WATCH_S):
            self.peak = max(self.peak, _status("RssAnon"))

    def gib(self) -> float:
        """The most so far."""
        self.peak = max(self.peak, _status("RssAnon"))
        return round(self.peak / 2**20, 2)


def _status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    return 0


def since_start() -> float:
    """Seconds since this process began."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    began = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return round(float(Path("/proc/uptime").read_text().split()[0]) - began, 2)


def run(given: argparse.Namespace) -> None:
    """Read the files, then measure in a child process."""
    if os.environ.get(CHILD):
        measure(given)
        sys.stdout.flush()
        os._exit(0)  # graphs and pinned memory take seconds to take apart
    warm_up(given)
    with contextlib.ExitStack() as stack:
        child = os.environ | {CHILD: "1"}
        if given.cold:
            places = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "UNSLOTH_COMPILE_LOCATION")
            child |= {place: stack.enter_context(tempfile.TemporaryDirectory()) for place in places}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=child).returncode)


def warm_up(given: argparse.Namespace) -> None:
    """Read the weights and compile the rival's Python files, so that being the first is no disadvantage."""
    for path in sorted(given.model.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(2**26):
                pass
    packages = ["transformers", "peft", "bitsandbytes", "accelerate"]
    packages += ["unsloth_factory"] if given.rival in rivals.OURS else ["unsloth", "unsloth_zoo", "trl", "datasets"]
    for package in packages:
        found = importlib.util.find_spec(package)
        for folder in (found.submodule_search_locations or []) if found else []:
            compileall.compile_dir(folder, quiet=2, workers=4)


def measure(given: argparse.Namespace) -> None:
    """The load, and for `lengths` all that follows from it."""
    memory = HostMemory()
    memory.start()
    try:
        _measure(given, memory)
    finally:
        memory.over.set()


def _measure(given: argparse.Namespace, memory: HostMemory) -> None:
    rivals.import_libraries(given.rival)
    imported = since_start()
    rivals.cap(given.cap)
    given.runs.mkdir(parents=True, exist_ok=True)
    whole, depths = given.model, given.layers or [depth(given.model)]
    given.model = shortened(whole, depths[0], given.runs)
    lengths = [tokens for tokens in given.tokens or LENGTHS if tokens <= _positions(whole)]
    longest = _positions(whole) if given.what == "lengths" else min(8192, _positions(whole))
    rival = rivals.load(given, longest)
    rivals.finish()
    loaded, while_loading, host_while_loading = since_start(), rivals.peaks(), memory.gib()
    rival.micro_batch([min(FIRST_TOKENS, lengths[-1])])
    rival.update()
    rivals.finish()
    rivals.report(
        what="load", **facts(given, rival, depths[0]), compile_caches="cold" if given.cold else "as found",
        imports_s=imported, loaded_s=loaded, first_step_s=since_start(), load_gib=while_loading["peak_gib"],
        load_host_anon_gib=host_while_loading, host_anon_gib=memory.gib(), computed=rival.computed,
        **rivals.peaks(), driver_gib=rivals.driver_gib(),
    )  # fmt: skip
    if given.what == "load":
        return
    fitted, failed = walk(given, rival, depths[0], lengths)
    if given.tokens is None:
        _longest(given, rival, depths[0], fitted, failed, _positions(whole))
    if given.rival == "fast" and given.recompute:
        rival.recompute_all()
        walk(given, rival, depths[0], [tokens for tokens in lengths if tokens in RECOMPUTED_LENGTHS])
    for layers in depths[1:]:
        rival = None
        rivals.empty()
        given.model = shortened(whole, layers, given.runs)
        rival = rivals.load(given, longest)
        walk(given, rival, layers, [tokens for tokens in lengths if tokens in (given.tokens or LAYER_LENGTHS)])
    rivals.report(what="end", rival=given.rival, host_anon_gib=memory.gib(), seconds=since_start())


def facts(given: argparse.Namespace, rival: Any, layers: int) -> dict[str, Any]:
    """What a line says about who was measured."""
    name = given.model.name.removesuffix(f"-{layers}-layers")
    return {
        "model": name, "rival": given.rival, "cap_gib": given.cap, "setting": rival.setting, "layers": layers,
        "dtype": str(rival.dtype).removeprefix("torch."),
    }  # fmt: skip


def walk(given: argparse.Namespace, rival: Any, layers: int, lengths: list[int]) -> tuple[int | None, int | None]:
    """Measure each length until memory runs out: (longest that fitted, first that did not)."""
    fitted = None
    for tokens in lengths:
        outcome = attempt(rival, lambda tokens=tokens: speed(rival, tokens, given.seconds))
        line = facts(given, rival, layers) | {"what": "lengths", "mix": f"one sequence of {tokens:,}", "tokens": tokens}
        if isinstance(outcome, str):
            rivals.report(**line, tokens_per_second=None, error=outcome)
            return fitted, tokens
        rivals.report(**line, **outcome, **rival.plan(tokens), **rivals.peaks(), driver_gib=rivals.driver_gib())
        fitted = tokens
    return fitted, None


def attempt(rival: Any, work: Callable[[], Any]) -> Any:
    """What the work gives, tried again after each of the rival's reliefs; or, as text, why it cannot be done."""
    from unsloth_factory.training.memory.shortage import Shortage
    from unsloth_factory.training.memory.shortage import attempt as attempt_once

    rival.begin()
    outcome: Any = None
    for relief in (None, *rival.reliefs()):
        if relief is not None:
            relief()
        try:
            outcome = attempt_once(work, rival.clean)
        except Exception as error:  # one length that fails in another way must not cost the others
            traceback.print_exc()
            outcome = Shortage(f"{type(error).__name__}: {error}")
        if not isinstance(outcome, Shortage):
            return outcome
        rival.clean()
    return outcome.message[:200]


def speed(rival: Any, tokens: int, seconds: float) -> dict[str, Any]:
    """Tokens a second: the median of windows, at least one, three if they take no longer than `seconds`.

    A window is an optimizer step over some micro-batches; before the first of them the sequence was seen once, short
    ones twice.
    """
    batches = min(MOST_BATCHES, max(1, WINDOW_TOKENS // tokens))
    for _ in range(2 if tokens <= WINDOW_TOKENS else 1):
        rival.micro_batch([tokens])
    rival.update()
    rivals.finish()
    windows: list[float] = []
    while not windows or (len(windows) < WINDOWS and sum(windows) < seconds):
        began = time.perf_counter()
        for _ in range(batches):
            rival.micro_batch([tokens])
        rival.update()
        rivals.finish()
        windows.append(time.perf_counter() - began)
    speeds = [round(batches * tokens / window) for window in windows]
    return {"tokens_per_second": round(statistics.median(speeds)), "speeds": speeds}


def _longest(
    given: argparse.Namespace, rival: Any, layers: int, fitted: int | None, failed: int | None, most: int
) -> None:
    """Report the longest sequence that fits, looked for between one that does and one that does not."""

    def fits(tokens: int) -> bool:
        def once() -> bool:
            rival.micro_batch([tokens])
            rival.update()
            rivals.finish()
            return True

        began, outcome = time.perf_counter(), attempt(rival, once)
        rivals.report(
            what="try", **facts(given, rival, layers), tokens=tokens, fits=outcome is True, **rival.plan(tokens),
            **rivals.peaks(), seconds=round(time.perf_counter() - began, 1), error=None if outcome is True else outcome,
        )  # fmt: skip
        return outcome is True

    tries = TRIES
    if failed is None and fitted is not None and fitted < most:
        tries -= 1
        fitted, failed = (most, None) if fits(most) else (fitted, most)
    low, high = fitted or 0, failed
    if high is not None:
        low, high = bisect(fits, low, high, tries)
    rivals.report(what="longest", **facts(given, rival, layers), tokens=low, too_long=high)


def bisect(fits: Callable[[int], bool], low: int, high: int, tries: int = TRIES) -> tuple[int, int]:
    """(longest known to fit, shortest known not to), multiples of `STEP` between one of each."""
    for _ in range(tries):
        middle = (low + high) // 2 // STEP * STEP
        if middle <= low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def _positions(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["max_position_embeddings"])
