"""Out of memory: what is recognised, what is cut, each lever, and recovery in a run."""

from __future__ import annotations

import gc
import json
import random
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_memory import Gauge, SmallCard, losses, opened, quick_collections  # noqa: F401
from training_jobs import load, make_job, pairs, said, samples

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import ModelSettings, RunSettings, TuningSettings
from unsloth_factory.data.batching import pack
from unsloth_factory.model.fast import pace
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.offload import BLOCK
from unsloth_factory.model.fast.planner import STEP
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training import step
from unsloth_factory.training.checkpoints.store import claim
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory import offload, relief
from unsloth_factory.training.memory.cuts import cut, memory_tokens, merged, row_lengths
from unsloth_factory.training.memory.levers import Levers
from unsloth_factory.training.memory.probe import longest_micro_batch, probe
from unsloth_factory.training.memory.shortage import Shortage, attempt, insist, is_shortage
from unsloth_factory.training.methods import Dpo, Sft
from unsloth_factory.training.session import LoopState

# --- what is recognised, and what an attempt gives back


@pytest.mark.parametrize(
    ("error", "means_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError(), True),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error: Exception, means_memory: bool) -> None:
    assert is_shortage(error) == means_memory


def test_torchs_own_cpu_error_is_one() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_shortage(error.value)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError):
        attempt(lambda: {}["x"], lambda: None)
    with pytest.raises(RuntimeError, match="shape"):
        attempt(partial(_raise, RuntimeError("shape")), lambda: None)


def _raise(error: Exception) -> None:
    raise error


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_failed_backward_pass_leaves_no_activation_behind() -> None:
    """Autograd's queue would keep the graph of the last one; a local variable of the failed frames any."""
    kept: list[Any] = []

    def work() -> None:
        value = torch.randn(10, requires_grad=True) * 2
        kept.append(weakref.ref(value.untyped_storage()))
        ((value * value).sum() + Failing.apply(value).sum()).backward()

    released: list[bool] = []
    assert isinstance(attempt(work, lambda: released.append(gc.collect() >= 0)), Shortage)
    assert released
    assert kept[0]() is None


def test_insisting_ends() -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise MemoryError
        return 5

    assert insist(work, lambda: None) == 5
    with pytest.raises(MemoryError):
        insist(partial(_raise, MemoryError()), lambda: None)


# --- cutting


def test_pieces_keep_order_and_limit() -> None:
    lengths = {"a": (150,), "b": (50,), "c": (100,), "d": (100,), "e": (300,), "f": (10,)}
    of = lengths.__getitem__
    assert cut("abcdef", of, limit=None, packing=True) == ["abcdef"]
    assert cut("abcdef", of, limit=710, packing=True) == ["abcdef"]
    assert cut("abcdef", of, limit=200, packing=True) == [["a", "b"], ["c", "d"], ["e"], ["f"]]
    assert cut("abcdef", of, limit=1, packing=True) == [[name] for name in "abcdef"]
    # padded, a and b take 2 x 150
    assert cut("abcdef", of, limit=200, packing=False) == [["a"], ["b", "c"], ["d"], ["e"], ["f"]]
    assert cut("ab", {"a": (3, 5), "b": (4, 2)}.__getitem__, limit=14, packing=True) == ["ab"]
    assert cut("ab", {"a": (3, 5), "b": (4, 2)}.__getitem__, limit=19, packing=False) == [["a"], ["b"]]


def test_samples_of_a_step_put_together() -> None:
    rows = samples(40, seed=3)
    budget = 60
    groups = merged(rows, row_lengths, budget)
    assert sorted(id(row) for group in groups for row in group) == sorted(id(row) for row in rows)
    order = {id(row): number for number, row in enumerate(rows)}
    for group in groups:
        places = [order[id(row)] for row in group]
        assert places == sorted(places)
        assert len(group) == 1 or sum(sum(row_lengths(row)) for row in group) <= budget
    firsts = [order[id(group[0])] for group in groups]
    assert firsts == sorted(firsts)
    tokens = sum(sum(row_lengths(row)) for row in rows)
    assert len(groups) <= 1.25 * tokens / budget + 1
    assert merged(rows, row_lengths, 1) == [[row] for row in rows]


def test_the_quickest_sizes_of_micro_batches_are_taken() -> None:
    lengths = [(tokens,) for tokens in (250, 130, 120, 100, 90, 30, 20)]

    def groups(*costs: float) -> list[list[int]]:
        found = merged(lengths, lambda one: one, 4 * STEP, partial(pace.cost, costs))
        assert sorted(one for group in found for one in group) == sorted(lengths)
        return [sorted((one[0] for one in group), reverse=True) for group in found]

    fewest = [[250, 130, 120], [100, 90, 30, 20]]
    assert groups(1, 2, 3, 4) == fewest
    assert groups(1, 2, 3, 3.5) == fewest
    dear = groups(1, 2, 3, 9)  # a wave of tiles more for the last 128 tokens
    assert [sum(group) <= 3 * STEP for group in dear] == [True, True]
    assert pace.cost([1.0, 2.0], STEP) == 1.0
    assert pace.cost([1.0, 2.0], STEP + 1) == 2.0
    assert pace.cost([1.0, 2.0], 2 * STEP + 1) == 0.0


def test_samples_change_places_for_sizes_that_cost_less() -> None:
    """Costs in steps of 256 tokens, as matrix units have them: fewer tokens are rounded up."""
    chooser, budget = random.Random(5), 20 * STEP
    costs = [float(4 + 2 * (size // 2)) for size in range(1, 21)]
    known = partial(pace.cost, costs)
    saved = 0.0
    for _ in range(10):
        rows = [(min(4096, max(64, int(chooser.lognormvariate(6.55, 0.7)))),) for _ in range(32)]
        found, plain = (merged(rows, lambda one: one, budget, cost) for cost in (known, None))
        assert sorted(one for group in found for one in group) == sorted(rows)
        assert all(len(group) == 1 or sum(one[0] for one in group) <= budget for group in found)
        assert found == merged(rows, lambda one: one, budget, known)
        spent, before = (sum(known(sum(one[0] for one in group)) for group in groups) for groups in (found, plain))
        assert spent <= before
        saved += 1 - spent / before
    assert saved / 10 > 0.01


def test_many_samples_of_a_step_are_put_together_in_time() -> None:
    rows = [(100 + 37 * number % 700,) for number in range(2000)]
    costs = [float(size + size % 2) for size in range(1, 21)]
    started = time.process_time()  # of this process: others on the machine are not its business
    found = merged(rows, lambda one: one, 20 * STEP, partial(pace.cost, costs))
    assert time.process_time() - started < 5
    assert sum(map(len, found)) == len(rows)


def test_sizes_of_micro_batches_are_measured_in_rounds_from_the_largest_down(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def taken(_: Any, tokens: int) -> float:
        asked.append(tokens)
        return tokens + (100.0 if len(asked) <= 6 else 0.0)  # two slow rounds

    monkeypatch.setattr(pace, "_milliseconds", taken)
    layer: Any = SimpleNamespace(spec=SimpleNamespace(layers=3))
    assert pace.measure(layer, 3 * STEP) == [1.0 + STEP, 1.0 + 2 * STEP, 1.0 + 3 * STEP]
    assert asked == [3 * STEP, 2 * STEP, STEP] * (pace.REPEATS + 1)


def test_half_of_the_tokens_always_cuts() -> None:
    for seed in range(20):
        rows = samples(2 + seed % 5, seed=seed)
        for packing in (True, False):
            tokens = memory_tokens([row_lengths(row) for row in rows], packing)
            assert len(cut(rows, row_lengths, limit=tokens // 2, packing=packing)) >= 2


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("limit", [None, 40])
def test_the_longest_micro_batch_is_found(tmp_path: Path, job_in, packing: bool, limit: int | None) -> None:
    job = job_in(tmp_path, train_items=samples(50, longest=60), loop={"no_packing": not packing, "batch_size": 3})
    session = opened(job)
    session.state.levers.micro_batch_tokens = limit
    found = job.method.make_batch(longest_micro_batch(session), packing=packing, pad_id=0)
    every = [b for k in range(session.total_steps) for b in step.step_batches(session, k)]
    assert found.input_ids.numel() == max(batch.input_ids.numel() for batch in every)


def test_a_hundred_thousand_samples_are_looked_through_quickly(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, train_items=samples(1000) * 100, loop={"epochs": 3.0})
    session = opened(job)
    started = time.process_time()
    longest_micro_batch(session)
    assert time.process_time() - started < 4


# --- each lever by itself


def gradients(model: Path, folder: Path, levers: Levers, **changes: Any) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step, before clipping."""
    with claim(RunFolder(folder), RunSettings()) as store:
        job = make_job(folder, load(model), store, **changes)
        session = opened(job)
    for parameter in session.parameters:
        with torch.no_grad():
            parameter.add_(0.01)  # so that A has a gradient too
    session.state.levers = levers
    probe(session)
    session.job.loaded.model.train()
    found = step._gradients(session, 0)
    assert isinstance(found, step.Gradients)
    return found.loss, [p.grad.clone() for p in session.parameters]


CHUNKS = 4 * 640 * 5  # bytes of the logits of five positions


@pytest.mark.parametrize("method", [Sft, Dpo])
@pytest.mark.parametrize("packing", [True, False])
def test_a_lever_leaves_the_gradients(
    random_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any, packing: bool
) -> None:
    monkeypatch.setattr(offload, "SMALLEST", 0)
    items = samples(8) if method is Sft else pairs(8)
    changes = {"train_items": items, "loop": {"batch_size": 4, "max_grad_norm": 0.0, "no_packing": not packing}}
    compute = partial(gradients, random_model_dir, **changes)
    loss, plain = compute(tmp_path / "0", Levers(), method=method())
    exact = (Levers(checkpointing=True), Levers(offload=True), Levers(checkpointing=True, offload=True))
    close = (Levers(logit_bytes=CHUNKS), Levers(micro_batch_tokens=30), Levers(30, None, CHUNKS, True, True))
    for number, levers in enumerate((*exact, *close), 1):
        loss_now, values = compute(tmp_path / str(number), levers, method=method())
        assert loss_now == pytest.approx(loss, rel=1e-6), levers
        for one, other in zip(plain, values, strict=True):
            assert torch.equal(one, other) if levers in exact else torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_offloaded_tensors_leave_and_weights_stay(random_model_dir: Path) -> None:
    loaded = load(random_model_dir)
    batch = pack(samples(3))
    moved: list[tuple[int, ...]] = []
    real = offload._to_host
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "_to_host", lambda tensor: (moved.append(tuple(tensor.shape)), real(tensor))[1])
        with offload.offloaded(loaded, smallest=0):
            Sft().loss(loaded, batch).total.backward()
    assert moved
    assert not {tuple(p.shape) for p in loaded.model.parameters()} & set(moved)


def test_levers_in_the_order_of_their_price(tmp_path: Path, job_in, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relief, "LEAST_LOGITS", 4 * 640 * 2)
    gauge = Gauge()
    gauge.offloads = True
    job = job_in(tmp_path, method=SmallCard(0), meter=gauge, loop={"batch_size": 2})
    with pytest.raises(UserError, match="Out of GPU memory in step 1 with 1 sample of .*--max_seq_length") as error:
        train(job)
    text = said(job)
    order = ["tokens in a micro-batch of several", "logits in chunks of", "computed again", "in the CPU's memory"]
    places = [text.index(f"It is done again with {words}") for words in ("at most", "the logits", "each layer")]
    assert places == sorted(places)
    assert text.index("activations kept in the CPU's memory") > places[-1]
    for words in order:
        assert words in str(error.value)
    assert "--quantization_bit 4" in str(error.value)
    assert "--optimizer paged_adamw_8bit" in str(error.value)
    assert job.loaded.recomputes_layers


# --- recovery in a run


def test_the_fast_engine_offloads_its_inputs_at_the_last(tmp_path: Path, job_in, random_model_dir: Path) -> None:
    gauge = Gauge()
    gauge.offloads = True
    settings = ModelSettings(model=str(random_model_dir), engine="fast")
    fast = load_model(settings, for_training=True, tuning=TuningSettings(lora_r=4), device=torch.device("cpu"))
    job = job_in(tmp_path, loaded=fast, method=SmallCard(0), meter=gauge)
    with pytest.raises(UserError, match="Out of GPU memory in step 1"):
        train(job)
    text = said(job)
    assert text.index("each layer computed again") < text.index("activations kept in the CPU's memory")
    assert fast.decoder.planner.recomputes_all
    assert fast.decoder.planner.plan(20) == [Saving.OFFLOAD, Saving.RECOMPUTE]


def test_a_fast_run_goes_on_with_offloaded_inputs(tmp_path: Path, job_in, random_model_dir: Path) -> None:
    """The same losses as without the fault, bit for bit."""

    def run(folder: Path, levers: Levers) -> tuple[list[float], int]:
        settings = ModelSettings(model=str(random_model_dir), engine="fast")
        fast = load_model(settings, for_training=True, tuning=TuningSettings(lora_r=4), device=torch.device("cpu"))
        levers.apply(fast)
        train(job_in(folder, loaded=fast, loop={"max_steps": 3}))
        return losses(folder), fast.decoder.host_inputs.size

    kept, offloaded = run(tmp_path / "kept", Levers()), run(tmp_path / "offloaded", Levers(offload=True))
    assert offloaded[0] == kept[0]
    assert (kept[1], offloaded[1]) == (0, BLOCK)


def test_the_step_is_repeated_with_smaller_micro_batches(tmp_path: Path, job_in) -> None:
    loop = {"batch_size": 4, "accumulation_steps": 2}
    train(job_in(tmp_path / "large", loop=loop))
    # the fault comes in the second micro-batch of step 2, when the first has left its gradients behind
    job = job_in(tmp_path / "small", loop=loop, method=SmallCard(1, start=3))
    train(job)
    assert losses(tmp_path / "small") == pytest.approx(losses(tmp_path / "large"), rel=1e-5)
    text = said(job)
    assert "out of memory in step 2 with 4 samples of" in text
    assert "out of memory in step 2 with 2 samples of" in text
    assert "Each step keeps its samples" in text
    state = json.loads((tmp_path / "small" / "checkpoint-6" / "state.json").read_text())
    assert state["loop"]["levers"]["micro_batch_tokens"] < 24


def test_a_resumed_run_keeps_its_levers(tmp_path: Path, job_in) -> None:
    train(job_in(tmp_path, loop={"batch_size": 4, "epochs": 2.0}, method=SmallCard(1)))
    job = job_in(tmp_path, loop={"batch_size": 4, "epochs": 2.0}, method=SmallCard(1), run={"resume": "checkpoint-3"})
    train(job)
    assert "out of memory" not in said(job)


def test_old_states_load() -> None:
    state = LoopState(step=4)
    state.load({"step": 7, "micro_batch": 2, "seconds": 1.5})
    assert (state.step, state.seconds, state.levers) == (7, 1.5, Levers())
    state.load({"levers": {"offload": True, "of_a_later_version": 3}})
    assert state.levers == Levers(offload=True)
    assert LoopState(**{"levers": Levers(3)}).to_dict()["levers"]["micro_batch_tokens"] == 3


def test_joined_levers_are_the_tighter_ones() -> None:
    one, other = Levers(100, None, 7, True, False), Levers(50, 9, 8, False, True)
    assert one.joined(other) == other.joined(one) == Levers(50, 9, 7, True, True)
