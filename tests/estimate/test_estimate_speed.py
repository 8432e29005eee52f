"""Speed and workload of a training that was never run."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from unsloth_factory.data.batching import StepPlan  # noqa: E402
from unsloth_factory.estimate import speed  # noqa: E402
from unsloth_factory.estimate.layers import Rows  # noqa: E402
from unsloth_factory.estimate.memory import Rehearsal, micro_batch_cost  # noqa: E402
from unsloth_factory.estimate.rehearsal import Work  # noqa: E402
from unsloth_factory.estimate.workload import Sample, Workload, assumed_workload, rows_of  # noqa: E402
from unsloth_factory.model.gpus import GPUS  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimate_jobs import SHAPES, training  # noqa: E402

# -- speed ------------------------------------------------------------------------------------------------------------

H200 = GPUS["H200"]


def test_cost_of_few_layers_stands_for_all() -> None:
    rows = Rows(400, 400, True, 200)
    for kind in ("qlora", "full", "freeze"):
        job = training(replace(SHAPES["1.7B"], layers=7), kind)
        whole = Rehearsal(job).cost(rows)
        few = micro_batch_cost(job, rows)
        for phase, work in whole.items():
            assert few[phase].kernels == work.kernels, (kind, phase)
            assert few[phase].dense == pytest.approx(work.dense, rel=1e-9)
            assert few[phase].moved == pytest.approx(work.moved, rel=1e-9)


def test_the_products_of_a_forward_pass_are_two_a_weight_and_token() -> None:
    job = training(SHAPES["8B"])
    work = micro_batch_cost(job, Rows(1000, 1000, False, 1000))
    shape = job.shape
    weights = shape.layers * shape.layer_weights + shape.head + sum(job.trained_parameters().values())
    assert work["forward"].dense == pytest.approx(2 * 1000 * weights, rel=1e-6)
    assert 2.0 < (work["backward"].dense + work["recompute"].dense) / work["forward"].dense < 2.1


def test_the_slower_of_card_and_python_sets_the_pace() -> None:
    job = training(SHAPES["4B"])
    work = micro_batch_cost(job, Rows(256, 256, False, 128))
    found = speed.micro_batch_speed(work, H200, speed.Host(), masked=False)
    assert found.host_bound
    slow = replace(H200, products=1e13, bandwidth=1e11)
    card = speed.micro_batch_speed(work, slow, speed.Host(), masked=False)
    assert not card.host_bound
    assert card.seconds > found.seconds
    assert card.seconds == pytest.approx(card.card, rel=2e-3)


def test_card_and_python_hinder_each_other_where_they_take_the_same_time() -> None:
    work = {"forward": Work(kernels=1000, dense=1e12)}
    card = speed.card_seconds(work["forward"], H200, "forward", masked=False)
    found = speed.micro_batch_speed(work, H200, speed.Host(forward=card / 1000), masked=False)
    assert found.seconds == pytest.approx(2 ** (1 / speed.OVERLAP) * card)


def test_where_the_card_sets_the_pace_the_speed_is_what_was_measured() -> None:
    """Two micro-batches a step on the H200; the cases whose steps agreed within 10 %."""
    for model, kind, count, masked, tokens_per_second in (
        ("8B", "qlora", 4056, True, 4471),
        ("4B", "lora", 8113, True, 4973),
        ("8B", "lora", 8114, False, 5884),
    ):
        job = training(SHAPES[model], kind, optimizer="adamw_8bit", capability=(9, 0))
        pace = speed.Pace(job, H200, speed.Host(), [Rows(count, count, masked, count // 2)])
        step = 2 * pace.seconds(count) + speed.update_seconds(job, H200, speed.Host())
        assert 2 * count / step == pytest.approx(tokens_per_second, rel=0.15)


def test_a_pace_lies_between_those_rehearsed() -> None:
    job = training(replace(SHAPES["1.7B"], layers=2))
    batches = [Rows(count, count, False, count // 2) for count in (100, 1000, 8000, 8000)]
    pace = speed.Pace(job, GPUS["T4"], speed.Host(), batches)
    times = [pace.seconds(count) for count in (100, 500, 1000, 4000, 8000)]
    assert times == sorted(times)
    assert times[3] == pytest.approx((times[2] * 4000 + times[4] * 3000) / 7000)


# -- workload ---------------------------------------------------------------------------------------------------------


def test_rows_of_packed_and_padded_micro_batches() -> None:
    group = [Sample((10,), 4), Sample((30,), 20)]
    assert rows_of(group, True) == (Rows(40, 40, True, 24), 40)
    assert rows_of(group, False) == (Rows(60, 30, True, 24), 40)
    assert rows_of(group[:1], True) == (Rows(10, 10, False, 4), 10)
    assert rows_of([Sample((8, 9), 5)], True) == (Rows(17, 17, True, 5), 17)


def test_micro_batches_are_those_of_the_loop() -> None:
    lengths = [20, 500, 30, 40, 510, 60, 70]

    def order(count: int, size: int, accumulation: int) -> Any:
        plan = StepPlan(count, size, accumulation, 2.0, None, 7)
        return map(plan.step, range(plan.total_steps))

    steps = Workload(tuple(Sample((n,), n // 2) for n in lengths), order).steps(2, 2, 4096)
    plan = StepPlan(7, 2, 2, 2.0, None, 7)
    expected = [sum(lengths[i] for i in group) for k in range(plan.total_steps) for group in plan.step(k)]
    assert [rows.count for rows in steps.batches] == expected
    assert steps.longest.count == max(expected)
    assert (steps.count, steps.tokens) == (plan.total_steps, 2 * sum(lengths))
    short = Workload(tuple(Sample((n,), n // 2) for n in lengths), order).steps(1, 4, 100)
    assert short.longest.count == 100


def test_without_a_dataset_rows_of_the_longest_kind_are_assumed() -> None:
    workload = assumed_workload(2048, 2, True, epochs=3.0, max_steps=None)
    steps = workload.steps(2, 4, 1024)
    assert steps.count == 375
    assert steps.batches == [Rows(4096, 4096, True, 2048)] * 1500
    assert assumed_workload(64, 1, True, epochs=3.0, max_steps=5).steps(1, 1, 64).count == 5
