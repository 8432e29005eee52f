"""Where the time of a running training goes: the GPU's kernels and gaps, and what Python does meanwhile."""

from __future__ import annotations

import collections
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

GAP_NS = 200_000
"""Shorter pauses between kernels are the GPU's own."""
SAMPLE_S = 0.0005


def watch(done: Callable[[], bool]) -> dict[str, Any]:
    """Profile the whole process until `done`, from another thread than the one that trains.

    Returns:
        Seconds that passed, that kernels ran and that the GPU waited in `gaps`, kernels by time, and the places in
        this project's code where the main thread was found most often, as shares of all looks at it.
    """
    from torch.profiler import ProfilerActivity, profile

    places: collections.Counter[str] = collections.Counter()
    main = threading.main_thread().ident
    started = time.time()
    with profile(activities=[ProfilerActivity.CUDA]) as result:
        while not done():
            places[_place(sys._current_frames().get(main or 0))] += 1
            time.sleep(SAMPLE_S)
    looks = sum(places.values())
    return {
        "wall_s": round(time.time() - started, 3),
        **_kernels(result),
        "python": {name: round(count / looks, 4) for name, count in places.most_common(40)},
    }


def _place(frame: Any) -> str:
    """The innermost two functions of this project."""
    names: list[str] = []
    while frame is not None and len(names) < 2:
        if "unsloth_factory" in frame.f_code.co_filename:
            names.append(f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(names)


def _kernels(result: Any) -> dict[str, Any]:
    spans, by_name = [], collections.Counter[str]()
    for event in result.profiler.kineto_results.events():
        if event.duration_ns() and "CUDA" in str(event.device_type()) and not event.name().startswith("cudaGraph"):
            spans.append((event.start_ns(), event.start_ns() + event.duration_ns()))
            by_name[event.name()[:80]] += event.duration_ns()
    spans.sort()
    busy, gaps, end = 0, [], spans[0][0]
    for start, stop in spans:
        if start - end > GAP_NS:
            gaps.append(round((start - end) / 1e6, 1))
        busy += max(0, stop - max(start, end))
        end = max(end, stop)
    return {
        "busy_s": round(busy / 1e9, 3), "span_s": round((end - spans[0][0]) / 1e9, 3), "kernels": len(spans),
        "gaps_s": round(sum(gaps) / 1e3, 3), "gaps": len(gaps), "longest_gaps_ms": sorted(gaps, reverse=True)[:30],
        "by_name_ms": {name: round(ns / 1e6, 1) for name, ns in by_name.most_common(45)},
    }  # fmt: skip
