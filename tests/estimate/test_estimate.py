"""The rehearsal against counted CPU tensors and against figures measured on a GPU; speed, workload, choices."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
from training_jobs import CPU, samples  # noqa: E402

from unsloth_factory.config.settings import ModelSettings, TuningSettings  # noqa: E402
from unsloth_factory.data.batching import StepPlan, pack  # noqa: E402
from unsloth_factory.estimate import decoder, speed  # noqa: E402
from unsloth_factory.estimate.allocator import CachingAllocator  # noqa: E402
from unsloth_factory.estimate.decoder import Decoder  # noqa: E402
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
from unsloth_factory.estimate.layers import Rows  # noqa: E402
from unsloth_factory.estimate.memory import Rehearsal, Training, micro_batch_cost  # noqa: E402
from unsloth_factory.estimate.rehearsal import Memory, Work  # noqa: E402
from unsloth_factory.estimate.workload import Sample, Workload, assumed_workload, rows_of  # noqa: E402
from unsloth_factory.model.gpus import GPUS, Gpu, find_gpu  # noqa: E402
from unsloth_factory.model.load import load_model  # noqa: E402
from unsloth_factory.model.loaded import LoadedModel  # noqa: E402
from unsloth_factory.model.shapes import ModelShape, find_config, read_shape  # noqa: E402
from unsloth_factory.training.methods import Sft  # noqa: E402

MIB, GIB = 2**20, 2**30


def qwen3(layers: int, hidden: int, intermediate: int, heads: int, tied: bool) -> ModelShape:
    return ModelShape("qwen3", layers, hidden, intermediate, heads, 8, 128, 151_936, tied, head_norms=True)


SHAPES = {
    "0.6B": qwen3(28, 1024, 3072, 16, True),
    "1.7B": qwen3(28, 2048, 6144, 16, True),
    "4B": qwen3(36, 2560, 9728, 32, True),
    "8B": qwen3(36, 4096, 12288, 32, False),
}
# One H200, torch 2.11, 2026-11-22 (benchmarks/plan_accuracy.py): rows, dense mask, trained positions of the longest
# micro-batch; max_memory_allocated and max_memory_reserved; how far the prediction may be from the latter.
MEASURED = [
    ("1.7B", "qlora", True, "adamw_8bit", "sft", (512, False, 241), 2096126464, 2388656128, 0.002),
    ("1.7B", "lora", True, "adamw_8bit", "sft", (5049, True, 2408), 5243307520, 5691670528, 0.003),
    ("4B", "qlora", False, "adamw_8bit", "sft", (1023, False, 497), 9534625280, 9846128640, 0.006),
    ("8B", "qlora", True, "adamw_8bit", "sft", (4072, True, 2016), 8919029248, 9701425152, 0.01),
    ("1.7B", "full", True, "adamw", "sft", (4072, True, 2016), 32655694336, 37404803072, 0.001),
    ("4B", "full", False, "adamw_8bit", "sft", (1023, False, 497), 57671155712, 61842915328, 0.001),
    ("1.7B", "qlora", True, "adamw_8bit", "dpo", (2043, True, 963), 2662636032, 2977955840, 0.01),
    ("8B", "lora", True, "adamw_8bit", "sft", (8188, False, 4080), 22064853504, 22351446016, 0.006),
    ("8B", "lora", False, "adamw_8bit", "sft", (2047, True, 993), 35400984576, 35750150144, 0.003),
    ("8B", "qlora", True, "adamw_8bit", "sft", (8140, True, 4034), 11308043776, 12022972416, 0.005),
    ("0.6B", "lora", True, "adamw_8bit", "sft", (16251, True, 8069), 4810721280, 5427429376, 0.06),
]


def training(shape: ModelShape, kind: str = "qlora", **changes: Any) -> Training:
    kinds = {"qlora": ("lora", True), "lora": ("lora", False), "full": ("full", False), "freeze": ("freeze", False)}
    name, quantized = kinds[kind]
    return Training(shape, name, quantized, **changes)  # type: ignore[arg-type]


# -- memory: what was measured on the GPU -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case[0]} {case[1]} {case[4]} {case[5][0]}")
def test_peak_memory_is_what_the_gpu_measured(case: tuple) -> None:
    model, kind, checkpointing, optimizer, method, (count, masked, trained), allocated, reserved, off = case
    job = training(
        SHAPES[model], kind, checkpointing=checkpointing, optimizer=optimizer, method=method, capability=(9, 0)
    )
    found = Rehearsal(job).estimate(Rows(count, count, masked, trained))
    assert found.reserved == pytest.approx(reserved, rel=off)
    assert found.allocated == pytest.approx(allocated, rel=0.02)
    assert found.allocated + found.slack == found.reserved


# -- memory: counted CPU tensors --------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Floating-point storages that operations have made and something still holds, in blocks of 512 bytes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.live: dict[int, tuple[weakref.ref, int]] = {}
        self.model = {value.untyped_storage()._cdata for value in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_flatten(out)[0]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                storage = value.untyped_storage()
                key = storage._cdata
                if key not in self.live and key not in self.model:
                    forget = weakref.ref(storage, lambda _, key=key: self.live.pop(key, None))
                    self.live[key] = (forget, -(-storage.nbytes() // 512) * 512)
        return out

    @property
    def total(self) -> int:
        return sum(size for _, size in self.live.values())


@pytest.fixture
def cuda_like_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft asks for CUDA's autocast; on a CPU it would cast inputs that it leaves alone on a GPU."""
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: asked("cpu"))


@pytest.fixture
def random_model(pytestconfig: pytest.Config, tmp_path: Path) -> Callable[..., Path]:
    """`make_random_model` of tests/conftest.py, into a folder of the test."""
    root = next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "make_random_model"))
    return partial(root.make_random_model, tmp_path / "model")


def load_bf16(folder: Path, kind: str) -> LoadedModel:
    settings = TuningSettings(lora_r=8, finetuning_type="lora" if "lora" in kind else kind)  # type: ignore[arg-type]
    loaded = load_model(
        ModelSettings(model=str(folder)),
        quantization_bit=4 if kind == "qlora" else None,
        dtype=torch.bfloat16,
        for_training=True,
        tuning=settings,
        device=CPU,
    )
    loaded.model.train()
    return loaded


def counted_after_forward(loaded: LoadedModel, batch: Any) -> int:
    gc.collect()
    with Counter(loaded.model) as counter:
        with loaded.autocast():
            total = Sft().loss(loaded, batch).total
        assert total.requires_grad
        return counter.total


def rehearsed_after_forward(job: Training, rows: Rows) -> int:
    """Everything that lives between the passes beside parameters: kept values, 16-bit copies of trained weights."""
    rehearsal = Rehearsal(job)
    model = Decoder(rehearsal.tape, rehearsal.layout, rows, rehearsal.lasting)
    loss = model._log_probs()
    model.casts.clear()
    workspaces = sum(buffer.block.size for buffer in rehearsal.lasting.workspaces.values())
    assert loss.node is not None
    return rehearsal.memory.allocator.allocated - workspaces


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen3", "qlora"),
        ("qwen3", "lora"),
        ("qwen3", "full"),
        ("qwen3", "freeze"),
        ("llama", "qlora"),
        ("qwen2", "lora"),
    ],
)
def test_kept_activations_are_those_of_the_real_model(
    family: str, kind: str, checkpointing: bool, random_model: Callable[..., Path], cuda_like_autocast: None
) -> None:
    """Byte for byte, in blocks of 512, for one packed document; the GPU figures above cover the masked kernels."""
    folder = random_model(family=family, layers=3, hidden=128)
    loaded = load_bf16(folder, kind)
    loaded.set_gradient_checkpointing(checkpointing)
    batch = pack(samples(1, longest=200)[:1])
    rows = Rows(batch.input_ids.numel(), batch.input_ids.numel(), False, batch.trained_tokens)
    job = training(read_shape(find_config(str(folder))), kind, lora_rank=8, checkpointing=checkpointing)
    small = 4 * 512  # scalars of the loss
    assert rehearsed_after_forward(job, rows) == pytest.approx(counted_after_forward(loaded, batch), abs=small)


def test_the_logits_chunk_is_the_loops() -> None:
    default = {field.name: field.default for field in dataclasses.fields(LoadedModel)}["logit_bytes"]
    assert default == decoder.LOGIT_BYTES


# -- memory: allocator and parts --------------------------------------------------------------------------------------


def test_allocator_rounds_and_takes_segments() -> None:
    allocator = CachingAllocator()
    small = [allocator.take(1), allocator.take(513)]
    assert (allocator.allocated, allocator.reserved) == (512 + 1024, 2 * MIB)
    medium = allocator.take(MIB + 1)
    assert allocator.reserved == 22 * MIB
    assert allocator.take(5 * MIB).address == medium.address + medium.size  # the rest of the 20
    large = allocator.take(25 * MIB + 1)
    assert allocator.reserved == 48 * MIB
    for block in (*small, medium, large):
        allocator.release(block)
    assert (allocator.allocated, allocator.reserved) == (5 * MIB, 48 * MIB)


def test_allocator_takes_the_smallest_fitting_block_and_joins_neighbours() -> None:
    allocator = CachingAllocator()
    first, second, third = (allocator.take(size * MIB) for size in (40, 20, 12))
    allocator.release(first)
    allocator.release(second)
    again = allocator.take(15 * MIB)  # from the block of 20, not from that of 40
    assert allocator.reserved == 72 * MIB
    assert again.address == second.address
    halves = [allocator.take(18 * MIB), allocator.take(20 * MIB)]  # both from the block of 40
    assert allocator.reserved == 72 * MIB
    for block in halves:
        allocator.release(block)
    assert allocator.take(40 * MIB).address == first.address  # joined again
    allocator.release(third)
    allocator.take(13 * MIB)
    assert allocator.reserved == 86 * MIB


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a micro-batch only weights, states and cuBLAS's workspaces live; no value is held by a cycle."""
    monkeypatch.setattr(gc, "isenabled", lambda: False)
    gc.disable()
    try:
        for kind in ("qlora", "lora", "full", "freeze"):
            rehearsal = Rehearsal(training(replace(SHAPES["1.7B"], layers=3), kind))
            rehearsal.cost(Rows(300, 300, True, 150))
            rehearsal.lasting.gradients.clear()
            workspaces = sum(buffer.block.size for buffer in rehearsal.lasting.workspaces.values())
            assert rehearsal.memory.allocator.allocated == workspaces, kind
    finally:
        gc.enable()


def reserved(job: Training, count: int = 600, masked: bool = False, trained: int = 300) -> int:
    return Rehearsal(job).estimate(Rows(count, count, masked, trained)).reserved


def test_what_takes_more_memory() -> None:
    shape = replace(SHAPES["1.7B"], layers=6)
    base = training(shape, optimizer="adamw_8bit")
    assert reserved(base) < reserved(base, count=1200)
    assert reserved(base) < reserved(replace(base, checkpointing=False))
    assert reserved(base) < reserved(replace(base, quantized=False))
    assert reserved(replace(base, lora_rank=64)) > reserved(base)
    assert reserved(replace(base, lora_target="q_proj", checkpointing=False)) < reserved(
        replace(base, checkpointing=False)
    )
    assert reserved(replace(base, lora_dropout=True, checkpointing=False)) > reserved(
        replace(base, checkpointing=False)
    )
    full = training(shape, "full", optimizer="adamw_8bit")
    assert reserved(full) > reserved(replace(base, quantized=False))
    assert (
        reserved(replace(full, optimizer="adamw"))
        > reserved(full)
        > reserved(replace(full, optimizer="paged_adamw_8bit"))
    )
    freeze = training(shape, "freeze", optimizer="adamw_8bit")
    assert reserved(replace(base, quantized=False)) < reserved(replace(freeze, freeze_last_n=4)) < reserved(full)
    assert reserved(freeze) < reserved(replace(freeze, freeze_last_n=4))
    t4 = replace(base, capability=(7, 5))
    assert reserved(t4) > reserved(base)  # no kernel takes grouped heads there
    assert reserved(t4, masked=True) <= reserved(t4)


def test_rows_beyond_a_sliding_window_get_a_dense_mask() -> None:
    shape = replace(SHAPES["1.7B"], layers=4, sliding_window=512)
    job = training(shape, checkpointing=False)
    assert reserved(job, count=500) == reserved(replace(job, shape=replace(shape, sliding_window=None)), count=500)
    assert reserved(job, count=900) == reserved(job, count=900, masked=True)


def test_parts_of_a_full_training_are_sixteen_bytes_a_parameter() -> None:
    shape = replace(SHAPES["1.7B"], layers=4)
    found = Rehearsal(training(shape, "full")).estimate(Rows(64, 64, False, 32))
    assert found.trained == shape.total
    for part, width in (("trained weights", 4), ("gradients", 4), ("optimizer state", 8)):
        assert found.parts[part] == pytest.approx(width * shape.total, rel=0.001), part
    assert found.parts["base weights"] == 0


def test_trained_parameters_are_those_of_the_real_model(random_model: Callable[..., Path]) -> None:
    folder = random_model(family="qwen2", layers=3, hidden=64)
    shape = read_shape(find_config(str(folder)))
    for kind in ("lora", "full", "freeze"):
        settings = TuningSettings(lora_r=4, finetuning_type=kind)  # type: ignore[arg-type]
        loaded = load_model(
            ModelSettings(model=str(folder)), dtype=torch.float32, for_training=True, tuning=settings, device=CPU
        )
        job = training(shape, kind, lora_rank=4)
        assert sum(job.trained_parameters().values()) == loaded.parameter_counts()[0], kind


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


def test_memory_counts_by_part() -> None:
    memory = Memory()
    block = memory.take(1000, "logits")
    assert (memory.parts["logits"], memory.peak) == (1024, 1024)
    memory.release(block, "logits")
    assert sum(memory.parts.values()) == 0
    assert memory.peak_parts["logits"] == 1024
    memory.forget_peak()
    assert memory.peak == 0
