"""Evaluation in little memory, the word before it runs out, and where the figures come from."""

from __future__ import annotations

import json
import math
import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from small_memory import Gauge, SmallCard, bits, losses, opened, quick_collections  # noqa: F401
from training_jobs import said, samples

from unsloth_factory.data.batching import pack
from unsloth_factory.model import host_memory
from unsloth_factory.model.host_memory import cgroup_rooms
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory.meter import GIB, HostMeter, Reading
from unsloth_factory.training.memory.watch import SETTLING, WINDOW, MemoryWatch
from unsloth_factory.training.methods import LossSum, Sft

# --- evaluation


class SmallEvaluation(Sft):
    """Runs out of memory in evaluation with more than some tokens."""

    def __init__(self, most: int) -> None:
        self.most = most

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        if not torch.is_grad_enabled() and batch.input_ids.numel() > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().loss(loaded, batch)


def test_evaluation_goes_on_in_smaller_pieces(tmp_path: Path, job_in) -> None:
    changes = {"eval_items": samples(7, seed=9), "loop": {"batch_size": 4, "max_steps": 2}}
    plain = train(job_in(tmp_path / "plain", **changes))
    job = job_in(tmp_path / "small", method=SmallEvaluation(30), **changes)
    result = train(job)
    assert result.eval_loss == pytest.approx(plain.eval_loss, rel=1e-6)
    assert bits(tmp_path / "small")[0] == bits(tmp_path / "plain")[0]
    assert "out of memory in the evaluation with 4 samples of" in said(job)
    with torch.no_grad():
        direct = Sft().loss(job.loaded, pack(changes["eval_items"]))
    assert result.eval_loss == pytest.approx(direct.total.item() / direct.count, rel=1e-5)


def test_a_sample_that_does_not_fit_is_left_out_and_named(tmp_path: Path, job_in) -> None:
    rows = samples(5, seed=9)
    longest = max(rows, key=lambda row: len(row.ids))
    others = [row for row in rows if row is not longest]
    changes = {"loop": {"batch_size": 4, "max_steps": 2}}
    plain = train(job_in(tmp_path / "plain", eval_items=others, **changes))
    most = max(len(row.ids) for row in others)
    assert most < len(longest.ids)
    job = job_in(tmp_path / "small", method=SmallEvaluation(most), eval_items=rows, **changes)
    result = train(job)
    assert result.eval_loss == pytest.approx(plain.eval_loss, rel=1e-6)
    assert f"one sample of {len(longest.ids)} tokens, {longest.source}; it is left out" in said(job)
    assert "The evaluation loss leaves out 1 of 5 samples" in said(job)


def test_evaluation_that_never_fits_does_not_end_the_training(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, method=SmallEvaluation(0), eval_items=samples(3, seed=9), loop={"max_steps": 3})
    result = train(job)
    assert result.steps == 3
    assert result.eval_loss is None
    assert "no evaluation loss this time" in said(job)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] is None
    assert math.isfinite(last["loss"])


# --- the word before it comes to that


def readings(used: list[float], peak: float = 4.0, limit: float = 8.0) -> list[Reading]:
    return [Reading(int(u * GIB), int(peak * GIB), int(limit * GIB)) for u in used]


def warnings(given: list[Reading], steps_left: int = 1000) -> list[str]:
    watch = MemoryWatch()
    return [text for reading in given if (text := watch.warning(reading, steps_left)) is not None]


def test_nearly_full_is_said_once() -> None:
    assert warnings(readings([2.0] * 50, peak=7.5)) == []
    found = warnings(readings([2.0] * 50, peak=7.7))
    assert found == ["the high-water mark is 7.70 GiB of 8.00 GiB (96 %)"]


def test_a_steady_rise_is_said_once_and_in_time() -> None:
    steps = SETTLING + WINDOW + 40
    rising = [2.0 + 0.01 * k for k in range(steps)]
    (text,) = warnings(readings(rising))
    assert text.startswith("it grows by 10.24 MiB a step, 2.39 GiB are in use between steps")
    assert "full in about 400 steps" in text
    assert warnings(readings(rising), steps_left=100) == []  # it ends before
    assert warnings(readings([2.0 + 0.001 * k for k in range(steps)])) == []  # too far away to be believed


def test_what_is_no_trend() -> None:
    steps = SETTLING + 3 * WINDOW
    settles = [2.0 + 1.5 * (1 - 0.9**k) for k in range(steps)]
    jumps = [2.0 if k < 60 else 3.5 for k in range(steps)]
    saw = [2.0 + 0.05 * (k % 10) for k in range(steps)]
    for used in ([2.0] * steps, settles, jumps, saw):
        assert warnings(readings(used)) == []


def test_a_run_warns_once_with_the_flags_to_use(tmp_path: Path, job_in) -> None:
    gauge = Gauge(Reading(GIB, 5 * GIB, 8 * GIB), Reading(GIB, int(7.76 * GIB), 8 * GIB))
    job = job_in(tmp_path, meter=gauge, loop={"max_steps": 5})
    train(job)
    text = said(job)
    assert text.count("Warning: step 2: GPU memory: the high-water mark is 7.76 GiB of 8.00 GiB (97 %)") == 1
    assert text.count("high-water mark") == 1
    assert "--batch_size 1 --accumulation_steps 4 (the same steps)" in text


# --- where the figures come from


def test_this_machines_memory() -> None:
    reading = HostMeter().read()
    assert 0 < reading.used <= reading.peak
    assert reading.used < reading.limit
    size = 64 * 2**20
    # memory of its own: malloc may hand out pages that the process has had for long
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held.write(b"1" * size)
        assert HostMeter().read().used - reading.used > 0.9 * size


def test_a_container_has_less_than_the_machine(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/outer/inner\n")
    for name, limit, current, droppable in (("outer", "1000", 400, 100), ("outer/inner", "max", 300, 0)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "memory.max").write_text(limit)
        (folder / "memory.current").write_text(str(current))
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 9\n")
    assert cgroup_rooms(tmp_path, membership) == [700]
    (tmp_path / "outer" / "inner" / "memory.max").write_text("350")
    assert sorted(cgroup_rooms(tmp_path, membership)) == [50, 700]
    assert cgroup_rooms(tmp_path, tmp_path / "none") == []


def test_the_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "cgroup_rooms", lambda: [12345])
    reading = HostMeter().read()
    assert reading.limit - reading.used == 12345
