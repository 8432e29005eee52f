"""The rehearsal of memory against counted CPU tensors and against figures measured on a GPU."""

from __future__ import annotations

import dataclasses
import gc
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
from unsloth_factory.data.batching import pack  # noqa: E402
from unsloth_factory.estimate import decoder  # noqa: E402
from unsloth_factory.estimate.allocator import CachingAllocator  # noqa: E402
from unsloth_factory.estimate.decoder import Decoder  # noqa: E402
from unsloth_factory.estimate.layers import Rows  # noqa: E402
from unsloth_factory.estimate.memory import Rehearsal, Training  # noqa: E402
from unsloth_factory.estimate.rehearsal import Memory  # noqa: E402
from unsloth_factory.model.load import load_model  # noqa: E402
from unsloth_factory.model.loaded import LoadedModel  # noqa: E402
from unsloth_factory.model.shapes import find_config, read_shape  # noqa: E402
from unsloth_factory.training.methods import Sft  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent))
from estimate_jobs import MIB, SHAPES, training  # noqa: E402

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


def test_memory_counts_by_part() -> None:
    memory = Memory()
    block = memory.take(1000, "logits")
    assert (memory.parts["logits"], memory.peak) == (1024, 1024)
    memory.release(block, "logits")
    assert sum(memory.parts.values()) == 0
    assert memory.peak_parts["logits"] == 1024
    memory.forget_peak()
    assert memory.peak == 0
