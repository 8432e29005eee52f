"""The fast engine's plan: memory and speed that were measured on an H200, and what they must follow.

`MEASURED` is one run of benchmarks/plan_accuracy.py (f1 to f6, 2026-11-22), to which the constants were fitted.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unsloth_factory.estimate import fast_engine
from unsloth_factory.estimate.fast_engine import FastEngine, why_not_fast
from unsloth_factory.estimate.forecast import Choice, Forecaster, best, larger, reductions
from unsloth_factory.estimate.memory import Training
from unsloth_factory.estimate.workload import Packed, assumed_workload
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.gpus import GPUS
from unsloth_factory.training.memory.cuts import merged

sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimate_jobs import GIB, SHAPES, training  # noqa: E402

H200 = GPUS["H200"]


def fast(model: str, kind: str = "qlora", **changes: Any) -> Training:
    return replace(training(SHAPES[model], kind, capability=(9, 0), optimizer="adamw_8bit", **changes), engine="fast")


def rows(lengths: tuple[int, ...]) -> Packed:
    return Packed(lengths, sum(lengths) // 2)


# model, kind, the micro-batches of a step; max_memory_reserved, tokens/s
MEASURED = {
    "f1": ("1.7B", "qlora", [(2028,) * 4] * 2, 13_465_812_992, 56_555),
    "f2": ("4B", "qlora", [(1016,) * 4], 25_251_807_232, 25_204),
    "f3": ("4B", "lora", [(4040,) * 2], 31_375_491_072, 20_318),
    "f4": ("8B", "qlora", [(2030,) * 2], 33_799_798_784, 15_030),
}


@pytest.mark.parametrize("name", MEASURED)
def test_memory_and_speed_as_measured(name: str) -> None:
    model, kind, micro_batches, reserved, pace = MEASURED[name]
    engine = FastEngine(fast(model, kind), H200)
    step = [rows(lengths) for lengths in micro_batches]
    assert engine.memory(step).reserved == pytest.approx(reserved, rel=0.02)
    tokens = sum(sum(one.lengths) for one in step)
    seconds = engine.seconds([step] * 1001) - engine.seconds([step])
    assert 1000 * tokens / seconds == pytest.approx(pace, rel=0.1)


# Qwen3-8B inside 14.2 GiB of one H200 with FlashAttention-4, 2026-11-22: one sequence of so many tokens, half of them
# trained; GiB reserved at most, tokens a second (benchmarks/engine.py lengths).
LENGTHS = {
    512: (13.41, 12_005), 1024: (13.42, 14_525), 2048: (13.48, 16_058), 4096: (13.94, 13_721), 8192: (14.17, 11_413),
    12288: (14.18, 10_426), 16384: (13.66, 9_412), 24576: (13.62, 8_249), 32768: (13.76, 7_211),
}  # fmt: skip


@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_sequence_as_measured(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_engine, "is_installed", lambda name: True)
    gib, pace = LENGTHS[tokens]
    engine = FastEngine(fast("8B"), replace(H200, memory=int(14.2 * GIB), context=0))
    step = [rows((tokens,))] * min(8, max(1, 8192 // tokens))
    assert engine.memory(step).reserved / GIB == pytest.approx(gib, rel=0.04)
    seconds = engine.seconds([step] * 101) - engine.seconds([step])
    assert 100 * tokens * len(step) / seconds == pytest.approx(pace, rel=0.18)


@pytest.mark.parametrize("card", ["T4", "3060", "H200"])
def test_what_fits_is_never_more_than_the_card_has(card: str) -> None:
    engine = FastEngine(fast("8B"), GPUS[card])
    known = [tokens for tokens in range(1024, 40_960, 1024) if engine.least([rows((tokens,))]) <= GPUS[card].room]
    assert len(known) > 10
    for tokens in known:
        assert engine.memory([rows((tokens,))]).reserved <= 1.02 * GPUS[card].room, tokens


def test_a_sample_may_be_cut_to_any_memory_but_not_to_none() -> None:
    """8B in 4 bit: 16 GB take samples of 2,048 tokens with room to spare, 8 GB recompute, 6 GB are too few."""
    job = fast("8B")
    forecasts = {}
    for gib in (80, 14.5, 8, 6):
        card = replace(H200, memory=int(gib * GIB))
        workload = assumed_workload(2048, 1, True, 1.0, 10, merged)
        forecasts[gib] = Forecaster(job, workload, card).forecast(Choice(2, 4, True, True, "adamw_8bit", 2048))
    assert [forecasts[gib].verdict for gib in (80, 14.5, 8)] == ["fits"] * 3
    assert forecasts[6].verdict == "does not fit"
    speeds = [forecasts[gib].tokens_per_second or 0 for gib in (80, 14.5, 8)]
    assert speeds[0] > speeds[1] > 1.1 * speeds[2]
    assert forecasts[80].longest == 8192
    assert 2048 <= forecasts[14.5].longest <= 4096
    for gib in (14.5, 8):
        assert forecasts[gib].memory.reserved <= gib * GIB - H200.context


@pytest.mark.parametrize(("gib", "longest"), [(14.5, 53_000), (24, 116_000), (8, 10_400)])
def test_one_layer_bounds_the_longest_sequence(gib: float, longest: int) -> None:
    """Not all layers' inputs: an H200 limited to 14.2 GiB trained 20,000 tokens with those on the card."""
    card = replace(H200, memory=int(gib * GIB))
    engine = FastEngine(fast("8B"), card)
    shares = [engine.least([rows((tokens,))]) / card.room for tokens in range(1024, 2 * longest, 1024)]
    assert shares == sorted(shares)
    assert 1024 * sum(share < 1 for share in shares) == pytest.approx(longest, rel=0.05)
    forecaster = Forecaster(fast("8B"), assumed_workload(longest // 2, 1, True, 1.0, 10, merged), card)
    forecast = forecaster.forecast(Choice(1, 4, True, True, "adamw_8bit", longest // 2))
    assert forecast.verdict == "fits"
    assert forecast.memory.reserved <= 1.01 * card.room
    assert Saving.OFFLOAD in engine.planner().plan(longest // 2)


def test_offloaded_layers_take_as_long_as_recomputed_ones() -> None:
    """But no graph is made for them."""
    small, large = (FastEngine(fast("8B", low_memory=True), replace(H200, memory=gib * GIB)) for gib in (15, 140))
    step = [rows((24_000,))]
    assert small.planner().offloaded(24_000)
    assert not large.planner().offloaded(24_000)
    captures = large.seconds([step]) - small.seconds([step])
    assert captures == pytest.approx(36 * 2.8e-3)


def test_new_sizes_cost_a_graph_each() -> None:
    engine = FastEngine(fast("4B"), H200)
    alike = [[rows((1000, 1000))]] * 10
    different = [[rows((1000, 1000 + 128 * number))] for number in range(10)]
    more = engine.seconds(different) - engine.seconds(alike)
    longer = sum(engine.seconds([one]) for one in different) - 10 * engine.seconds([alike[0]])
    assert more - longer == pytest.approx(9 * 36 * 2.8e-3, rel=0.01)


def test_dropout_takes_time_and_a_little_memory() -> None:
    room = replace(H200, memory=int(14.2 * GIB), context=0)
    plain, dropped = (FastEngine(fast("8B", lora_dropout=rate), room) for rate in (False, True))
    row = Packed((900, 900), 900)
    assert plain.seconds([[row] * 4] * 20) * 1.05 < dropped.seconds([[row] * 4] * 20) < plain.seconds([[row] * 8] * 20)
    works = [engine.planner().workspace(2048) for engine in (plain, dropped)]
    assert works[1] - works[0] == 2 * 2048 * SHAPES["8B"].intermediate


def test_the_attention_that_is_installed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper GPUs alone; of samples of 8,192 tokens attention is nearly half."""
    step = [[rows((8192,))]]
    engines = [FastEngine(fast("4B"), GPUS[name]) for name in ("H200", "A100")]
    monkeypatch.setattr(fast_engine, "is_installed", lambda name: False)
    before = [engine.seconds(step) for engine in engines]
    monkeypatch.setattr(fast_engine, "is_installed", lambda name: name == "flash-attn-4")
    after = [FastEngine(engine.training, engine.gpu).seconds(step) for engine in engines]
    assert after[0] < 0.85 * before[0]
    assert after[1] == before[1]


def test_choices_that_the_engine_makes_itself_are_not_offered() -> None:
    workload = assumed_workload(1024, 1, True, 1.0, 10, merged)
    forecaster = Forecaster(fast("1.7B"), workload, H200)
    choice = Choice(2, 4, True, True, "adamw", 1024)
    found = best(forecaster, choice)
    assert found is not None
    assert found.choice == choice
    assert not {"no checkpointing", "micro-batches of 4"} & {what for what, _ in larger(forecaster, choice)}
    assert [c.optimizer for c in reductions(choice, "lora", "fast")] == ["adamw_8bit", "paged_adamw_8bit"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"method": "dpo"}, "--method dpo"),
        ({"kind": "full"}, "--finetuning_type full"),
        ({"shape": replace(SHAPES["8B"], prequantized=True)}, "stored in 4 bit"),
        ({"shape": replace(SHAPES["8B"], sliding_window=4096)}, "this model"),
        ({"shape": replace(SHAPES["8B"], intermediate=12_300)}, "the rows of its 4-bit weights"),
    ],
)
def test_what_auto_leaves_to_the_standard_engine(changes: dict[str, Any], reason: str) -> None:
    assert why_not_fast(fast("8B")) is None
    assert reason in (why_not_fast(replace(fast("8B"), **changes)) or "")
