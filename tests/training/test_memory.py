"""Memory: what is tried before step 1, what is given up when it runs out, and the word before that."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import math
import time
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from training_jobs import load, make_job, pairs, said, samples

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import ModelSettings, RunSettings, TuningSettings
from unsloth_factory.data.batching import pack
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder
from unsloth_factory.training import step, update
from unsloth_factory.training.checkpoints.store import claim
from unsloth_factory.training.loop import train
from unsloth_factory.training.memory import meter, offload, relief
from unsloth_factory.training.memory.cuts import cut, memory_tokens, merged, row_lengths
from unsloth_factory.training.memory.levers import Levers
from unsloth_factory.training.memory.meter import GIB, HostMeter, Reading, cgroup_rooms
from unsloth_factory.training.memory.probe import longest_micro_batch, probe
from unsloth_factory.training.memory.shortage import Shortage, attempt, insist, is_shortage
from unsloth_factory.training.memory.watch import SETTLING, WINDOW, MemoryWatch
from unsloth_factory.training.methods import Dpo, LossSum, Sft
from unsloth_factory.training.optimizers import allocate_state, make_optimizer
from unsloth_factory.training.reporting.progress import Progress
from unsloth_factory.training.session import LoopState, Session, open_session


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """What is in memory now need not be looked at each time that the memory runs out (0.3 s)."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class SmallCard(Sft):
    """Runs out of memory, from its n-th micro-batch on, with more than some samples."""

    def __init__(self, most: int, start: int = 0) -> None:
        self.most, self.start, self.calls = most, start, 0

    def loss(self, loaded: Any, batch: Any) -> LossSum:
        self.calls += 1
        part = super().loss(loaded, batch)
        if self.calls > self.start and len(batch.sources) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part


class Gauge:
    """A meter that shows what it is told."""

    name = "GPU memory"
    offloads = False

    def __init__(self, *readings: Reading, probes: bool = False) -> None:
        self.readings, self.probes = list(readings) or [Reading(GIB, GIB, 8 * GIB)], probes

    def read(self) -> Reading:
        return self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]

    def reset_peak(self) -> None:
        pass

    def release(self) -> None:
        pass


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def opened(job: Any) -> Session:
    return open_session(job, Progress(Console(file=io.StringIO()), 1))


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


def test_the_fast_engine_is_not_offered_what_it_does_not_have(tmp_path: Path, job_in, random_model_dir: Path) -> None:
    gauge = Gauge()
    gauge.offloads = True
    settings = ModelSettings(model=str(random_model_dir), engine="fast")
    fast = load_model(settings, for_training=True, tuning=TuningSettings(lora_r=4), device=torch.device("cpu"))
    job = job_in(tmp_path, loaded=fast, method=SmallCard(0), meter=gauge)
    with pytest.raises(UserError, match="Out of GPU memory in step 1"):
        train(job)
    assert "each layer computed again" in said(job)
    assert "in the CPU's memory" not in said(job)
    assert fast.decoder.planner.recomputes_all


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


# --- before step 1


def bits(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Hashes of all tensors of the run, and its metrics without what the clock decides."""
    volatile = ("time", "tokens_per_second", "memory")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    hashes = {path.relative_to(folder).as_posix(): tensor_hash(path) for path in sorted(folder.rglob("*.safetensors"))}
    return hashes, [{key: value for key, value in line.items() if key not in volatile} for line in lines]


def tensor_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else str(tensor).encode())
    return digest.hexdigest()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_probe_changes_no_bit(tmp_path: Path, job_in, optimizer: str) -> None:
    tuning = TuningSettings(lora_r=64, lora_dropout=0.2)
    changes = {"loop": {"optimizer": optimizer, "max_steps": 6}, "tuning": tuning, "eval_items": samples(3, seed=9)}
    train(job_in(tmp_path / "plain", **changes))
    job = job_in(tmp_path / "probed", meter=Gauge(probes=True), **changes)
    train(job)
    assert bits(tmp_path / "probed") == bits(tmp_path / "plain")
    longest = max(len(a.ids) + len(b.ids) for a, b in _neighbours(job))
    assert f"Memory      longest micro-batch of {longest} tokens: peak 1.00 GiB of 8.00 GiB" in said(job)
    resumed = job_in(tmp_path / "probed", meter=Gauge(probes=True), run={"resume": "checkpoint-3"}, **changes)
    train(resumed)
    assert bits(tmp_path / "probed") == bits(tmp_path / "plain")


def test_a_probe_draws_no_random_number(tmp_path: Path, job_in) -> None:
    session = opened(job_in(tmp_path, meter=Gauge(probes=True), tuning=TuningSettings(lora_r=4, lora_dropout=0.2)))
    before = torch.get_rng_state()
    weights = [p.detach().clone() for p in session.parameters]
    probe(session)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None and torch.equal(p, old) for p, old in zip(session.parameters, weights, strict=True))
    assert session.state == LoopState()


def _neighbours(job: Any) -> list[list[Any]]:
    session = opened(job)
    groups = [group for k in range(session.total_steps) for group in session.plan.step(k)]
    return [[job.train_items[i] for i in group] for group in groups if len(group) == 2]


def test_a_probe_pulls_the_levers(tmp_path: Path, job_in) -> None:
    job = job_in(tmp_path, meter=Gauge(probes=True), method=SmallCard(1), loop={"batch_size": 4})
    train(job)
    text = said(job)
    assert text.count("out of GPU memory before step 1") == 2
    assert "out of GPU memory in step" not in text
    assert "GiB; at most" in text  # the line of the probe names what is in force


def test_state_made_beforehand_is_what_the_first_step_makes(random_model_dir: Path) -> None:
    for kind in ("adamw", "adamw_8bit"):
        results = []
        for beforehand in (False, True):
            parameters = load(random_model_dir, TuningSettings(lora_r=64)).trainable_parameters()
            optimizer = make_optimizer(kind, parameters, weight_decay=0.1)
            if beforehand:
                allocate_state(optimizer)
                before = [p.detach().clone() for p in parameters]
                allocate_state(optimizer)
                assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))
            torch.manual_seed(1)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
            for _ in range(2):
                for parameter in parameters:
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            results.append([p.detach().clone() for p in parameters] + _state(optimizer))
        assert len(results[0]) == len(results[1])
        for one, other in zip(*results, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def _state(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [state for state in optimizer.state.values()]
    return [torch.as_tensor(state[key]) for state in states for key in sorted(state)]


def test_a_save_for_which_there_is_no_room_is_repeated(tmp_path: Path, job_in, monkeypatch) -> None:
    from unsloth_factory.training import loop as loop_module

    faults, real = [3], loop_module.write_tensors

    def write(*given: Any) -> None:
        real(*given)
        faults[0] -= 1
        if faults[0] in (0, 1):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loop_module, "write_tensors", write)
    job = job_in(tmp_path, loop={"max_steps": 6})
    train(job)
    assert job.store.steps() == [3, 6]
    assert not list(tmp_path.glob(".tmp-*"))


# --- the update


class Exploding:
    """Changes a weight and its state, then runs out of memory, so many times."""

    faults = 0

    def step(self: Any, closure: Any = None) -> Any:
        if Exploding.faults:
            Exploding.faults -= 1
            first = self.param_groups[0]["params"][0]
            first.data.add_(1)
            state = self.state[first]
            state["step"] += 1
            next(value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim).add_(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().step(closure)


class ExplodingAdamW(Exploding, torch.optim.AdamW):
    pass


class ExplodingAdamW8bit(Exploding, bitsandbytes.optim.AdamW8bit):
    pass


@pytest.fixture
def exploding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "AdamW", ExplodingAdamW)
    monkeypatch.setattr(bitsandbytes.optim, "AdamW8bit", ExplodingAdamW8bit)


def updated(job: Any, faults: int) -> list[torch.Tensor]:
    """Weights and optimizer state after one update with made-up gradients, interrupted so often."""
    session = opened(job)
    probe(session)
    torch.manual_seed(1)
    for parameter in session.parameters:
        parameter.grad = torch.randn_like(parameter)
    for group in session.optimizer.param_groups:
        group["lr"] = 1e-2
    Exploding.faults = faults
    step.apply_update(session)
    assert Exploding.faults == 0
    return [p.detach() for p in session.parameters] + _state(session.optimizer.optimizer)


@pytest.mark.parametrize("undo", [update.UNDO_BYTES, 1])  # the whole at once; a parameter at a time
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_half_done_update_is_put_back(
    tmp_path: Path, job_in, exploding, monkeypatch: pytest.MonkeyPatch, undo: int, optimizer: str
) -> None:
    monkeypatch.setattr(update, "UNDO_BYTES", undo)
    changes = {"loop": {"optimizer": optimizer}, "tuning": TuningSettings(lora_r=64)}
    plain = updated(job_in(tmp_path / "plain", **changes), 0)
    for one, other in zip(plain, updated(job_in(tmp_path / "faulty", **changes), 3), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(UserError, match="Out of memory in the update of step 1.*--optimizer paged_adamw_8bit"):
        updated(job_in(tmp_path / "hopeless", **changes), 99)


def test_a_torn_update_where_nothing_is_put_back_ends_the_run(tmp_path: Path, job_in, exploding, monkeypatch) -> None:
    monkeypatch.setattr(step, "apply_update", update._apply_whole)
    with pytest.raises(UserError, match="in the middle of the update of step 1.*of no use"):
        updated(job_in(tmp_path), 1)


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
    held = bytearray(64 * 2**20)
    assert HostMeter().read().used - reading.used > 0.9 * len(held)


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
    monkeypatch.setattr(meter, "cgroup_rooms", lambda: [12345])
    reading = HostMeter().read()
    assert reading.limit - reading.used == 12345
