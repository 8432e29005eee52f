"""Which settings fit a card, and which of them is the fastest."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

from unsloth_factory.estimate.forecast import (  # noqa: E402
    Choice,
    Forecaster,
    best,
    changes,
    first_that_fits,
    larger,
    longest_that_fits,
    reductions,
    splits,
)
from unsloth_factory.estimate.workload import Sample, Workload, assumed_workload  # noqa: E402
from unsloth_factory.model.gpus import GPUS, Gpu, find_gpu  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimate_jobs import SHAPES, training  # noqa: E402

# -- choices ----------------------------------------------------------------------------------------------------------

CHOICE = Choice(2, 4, True, True, "adamw", 1024)
SMALL = replace(SHAPES["1.7B"], layers=3, vocabulary=5000)


def forecaster(gpu: Gpu, kind: str = "qlora", **changes: Any) -> Forecaster:
    return Forecaster(training(SMALL, kind, **changes), assumed_workload(1024, 1, True, 1.0, 10), gpu)


def card(needed: Callable[[Forecaster], int]) -> Gpu:
    """A T4 with just the memory that something needs, and a little."""
    t4 = GPUS["T4"]
    return replace(t4, memory=int(needed(forecaster(t4)) / 0.93) + t4.context)


def test_splits_keep_the_samples_of_a_step() -> None:
    assert [(c.batch_size, c.accumulation_steps) for c in splits(replace(CHOICE, batch_size=3))] == [
        (1, 12), (2, 6), (4, 3),
    ]  # fmt: skip


def test_the_best_choice_is_the_fastest_that_fits() -> None:
    rich = forecaster(GPUS["H200"])
    found = best(rich, CHOICE)
    assert found is not None
    assert found.choice.batch_size * found.choice.accumulation_steps == 8
    others = [rich.forecast(replace(c, checkpointing=on)) for c in splits(CHOICE) for on in (True, False)]
    assert found.seconds == min(other.seconds or 0 for other in others)
    assert not found.choice.checkpointing
    # where nothing is clearly faster the given choice stays
    again = best(rich, found.choice)
    assert again is not None
    assert again.choice == found.choice


def test_on_a_card_of_unknown_speed_the_largest_micro_batch_wins() -> None:
    found = best(forecaster(find_gpu("80GB")), CHOICE)
    assert found is not None
    assert found.seconds is None
    assert (found.choice.batch_size, found.choice.checkpointing) == (8, False)


def test_reductions_go_from_cheap_to_dear() -> None:
    start = replace(CHOICE, checkpointing=False, quantized=False)
    steps = [changes(start, choice) for choice in reductions(start, "lora")]
    assert steps == [
        ["micro-batches of 1 x 8"],
        ["micro-batches of 1 x 8", "checkpointing"],
        ["micro-batches of 1 x 8", "checkpointing", "adamw_8bit"],
        ["micro-batches of 1 x 8", "checkpointing", "adamw_8bit", "4-bit base weights"],
        ["micro-batches of 1 x 8", "checkpointing", "paged_adamw_8bit", "4-bit base weights"],
    ]
    assert not any(choice.quantized for choice in reductions(replace(start, quantized=False), "full"))


def test_the_first_that_fits_gives_up_no_more_than_it_must() -> None:
    start = replace(CHOICE, batch_size=8, accumulation_steps=1, quantized=False)
    quantized = replace(start, batch_size=1, accumulation_steps=8, quantized=True)
    tight = forecaster(card(lambda f: f.forecast(quantized).memory.reserved))
    assert best(tight, start) is None
    found = first_that_fits(tight, start)
    assert found is not None
    assert found.verdict == "fits"
    assert found.choice.quantized
    assert found.choice.optimizer == "adamw"
    assert found.choice.max_seq_length == start.max_seq_length


def test_at_last_samples_get_shorter_and_at_the_end_nothing_fits() -> None:
    last = replace(CHOICE, batch_size=1, accumulation_steps=8, optimizer="paged_adamw_8bit", max_seq_length=512)
    found = first_that_fits(forecaster(card(lambda f: f.forecast(last).memory.reserved)), CHOICE)
    assert found is not None
    assert 256 <= found.choice.max_seq_length < 1024
    assert first_that_fits(forecaster(find_gpu("0.6GB")), CHOICE) is None


def test_the_longest_samples_that_fit() -> None:
    tight = forecaster(card(lambda f: f.forecast(CHOICE).memory.reserved))
    longest = longest_that_fits(tight, CHOICE, 8192)
    assert longest is not None
    assert 1024 <= longest < 1500
    assert tight.forecast(replace(CHOICE, max_seq_length=longest)).verdict == "fits"
    assert tight.forecast(replace(CHOICE, max_seq_length=longest + 64)).verdict != "fits"
    assert longest_that_fits(forecaster(find_gpu("0.6GB")), CHOICE) is None


def test_the_next_larger_settings() -> None:
    names = [what for what, _ in larger(forecaster(GPUS["T4"]), CHOICE)]
    assert names == ["no checkpointing", "micro-batches of 4", "16-bit base weights", "samples up to 2,048 tokens"]
    stored = Forecaster(
        training(replace(SMALL, prequantized=True, max_positions=1024)),
        Workload((Sample((9,), 5),) * 8, assumed_workload(9, 1, True, 1.0, 1).order),
        GPUS["T4"],
    )
    kept = replace(CHOICE, checkpointing=False, accumulation_steps=1, optimizer="adamw_8bit")
    assert [what for what, _ in larger(stored, kept)] == ["32-bit optimizer"]


def test_verdicts_around_the_limit() -> None:
    need = forecaster(GPUS["T4"]).forecast(CHOICE).memory.reserved
    for share, verdict in ((0.90, "fits"), (0.97, "tight"), (1.05, "does not fit")):
        gpu = replace(GPUS["T4"], memory=int(need / share) + GPUS["T4"].context)
        assert forecaster(gpu).forecast(CHOICE).verdict == verdict


def test_estimating_needs_no_torch() -> None:
    import subprocess
    import sys

    program = (
        "import sys, unsloth_factory.estimate.forecast, unsloth_factory.model.gpus\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
