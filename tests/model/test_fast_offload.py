"""Layer inputs in the CPU's memory: the same bits, the order of the copies, and which layers the planner sends there.

What that order is good for on a GPU is checked in test_fast_streams.py.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.rotary import Heads
from unsloth_factory.model.fast import planner as planner_module
from unsloth_factory.model.fast.decoder import FastDecoder
from unsloth_factory.model.fast.layer import Layer, Row, Saving
from unsloth_factory.model.fast.load import FolderWeights, load_fast
from unsloth_factory.model.fast.offload import BLOCK, Away, HostInputs
from unsloth_factory.model.fast.planner import Planner, launched, workspace
from unsloth_factory.model.fast.spec import DecoderSpec
from unsloth_factory.model.lora import attach_lora

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LAYERS, HIDDEN = 5, 64
KEEP, DROP, AGAIN, AWAY = Saving.KEEP, Saving.DROP_GATE_UP, Saving.RECOMPUTE, Saving.OFFLOAD
PLANS = (
    [AWAY] * LAYERS, [AWAY, AWAY, AGAIN, AGAIN, KEEP], [AWAY] * 4 + [KEEP], [AGAIN, AWAY, DROP, AWAY, KEEP],
    [KEEP, AWAY, AWAY, KEEP, AWAY],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parent.parent / "conftest.py"))
    return root.make_random_model(tmp_path_factory.mktemp("deep"), layers=LAYERS, hidden=HIDDEN)


@pytest.fixture
def model(folder: Path) -> Any:
    """With an adapter whose matrices are not 0, and blocks that end in the middle of an input."""
    from transformers import AutoConfig

    fast = load_fast(FolderWeights(folder, CPU, torch.float32), AutoConfig.from_pretrained(folder), quantized=True)
    fast = attach_lora(fast, TuningSettings(lora_r=4, lora_alpha=8), 7)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in fast.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    fast.model.model.bind()
    fast.model.model.host_inputs = HostInputs(CPU, block=1000)
    return fast.train()


def row_of(decoder: FastDecoder, lengths: tuple[int, ...]) -> tuple[torch.Tensor, Row]:
    """Input [T, h] and row of documents."""
    positions = torch.cat([torch.arange(n) for n in lengths])
    ids = torch.randint(5, 250, (sum(lengths),), generator=torch.Generator().manual_seed(sum(lengths)))
    return decoder.embed(ids).detach(), Row(*decoder.table.of(positions), Documents.of(list(lengths), CPU))


def both_passes(model: Any, plan: list[Saving], lengths: tuple[int, ...] = (7, 1, 12)) -> dict[str, torch.Tensor]:
    """Hidden states and gradients of one micro-batch through autograd, as in training."""
    decoder = model.model.model
    decoder.planner.forced = plan
    model.zero_grad()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = torch.randint(5, 250, positions.shape, generator=torch.Generator().manual_seed(sum(lengths)))
    hidden = decoder(input_ids=ids, position_ids=positions).last_hidden_state
    (hidden * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return found | {"hidden": hidden.detach()}


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_wherever_inputs_wait(model: Any, plan: list[Saving]) -> None:
    """Over micro-batches of several lengths, so that places are used again and their number grows."""
    for lengths in ((7, 1, 12), (30, 11), (3,), (7, 1, 12)):
        kept, found = (both_passes(model, one, lengths) for one in ([KEEP] * LAYERS, plan))
        assert all(torch.equal(kept[name], found[name]) for name in kept)
        assert any(float(found[name].norm()) > 0 for name in found if "lora_A" in name)


def test_room_is_taken_once_and_given_back(model: Any) -> None:
    decoder = model.model.model
    sizes = []
    for tokens in (20, 5, 20, 41):
        both_passes(model, [AWAY] * 4 + [KEEP], (tokens,))
        sizes.append(decoder.host_inputs.size)
    assert sizes == [-(-4 * most * HIDDEN * 4 // 1000) * 1000 for most in (20, 20, 20, 41)]
    places = [block.data_ptr() for block in decoder.host_inputs._blocks]
    both_passes(model, [AWAY] * 4 + [KEEP], (41,))
    assert places == [block.data_ptr() for block in decoder.host_inputs._blocks]
    decoder.give_up_memory()
    assert decoder.host_inputs.size == 0
    both_passes(model, [AWAY] * 4 + [KEEP], (20,))
    assert decoder.host_inputs.size == sizes[0]


def test_inputs_leave_and_come_back_one_layer_ahead(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that makes the copies of a GPU right, and no input but the next two beside the computing layer."""
    decoder, events, inputs = model.model.model, [], []
    host, number = HostInputs(CPU), {id(layer): index for index, layer in enumerate(decoder.stack)}

    def noted(name: str, method: Any) -> Any:
        def call(self: Any, first: Any, *arguments: Any, **options: Any) -> Any:
            which = number[id(self)] if isinstance(self, Layer) else None
            if isinstance(first, Away):
                which = first.start // first.size
            result = method(self, first, *arguments, **options)
            if isinstance(result, Away):
                which = result.start // result.size
                inputs.append(weakref.ref(first))
            if name == "fetch":
                inputs.append(weakref.ref(result))
            events.append((name, which, sum(x() is not None for x in inputs)))
            return result

        return call

    for owner, names in ((HostInputs, ("send", "wait", "fetch")), (Layer, ("forward", "backward"))):
        for name in names:
            monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    decoder.host_inputs = host
    x, row = row_of(decoder, (20,))
    with torch.no_grad():
        last, saved = decoder.forward_stack(x, row, [AWAY] * 3 + [AGAIN, KEEP])
        del x
        decoder.adapter.prepare()
        out = [(name, which) for name, which, _ in events]
        away = [(name, n) for n in range(3) for name in ("send", "forward", "wait")]
        assert out == [*away, ("forward", 3), ("forward", 4)]
        assert [one.x.numel() == 0 for one in saved] == [True] * 3 + [False] * 2
        assert not any(x() is not None for x in inputs)
        events.clear()
        decoder.backward_stack(torch.ones_like(last), last, saved, row)
    back = [(name, which) for name, which, _ in events]
    assert back == [
        ("backward", 4), ("fetch", 2), ("backward", 3), ("wait", 2), ("fetch", 1), ("backward", 2), ("wait", 1),
        ("fetch", 0), ("backward", 1), ("wait", 0), ("backward", 0),
    ]  # fmt: skip
    assert max(held for _, _, held in events) == 2


def test_a_pass_that_fails_waits_for_its_copies(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise one might write where something else lies by then."""
    joined: list[bool] = []

    def fail(*arguments: Any) -> None:
        joined.clear()
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(HostInputs, "join", lambda self: joined.append(True))
    monkeypatch.setattr(Layer, "attend_backward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        both_passes(model, [AWAY] * 4 + [KEEP])
    assert joined == [True]
    with pytest.raises(torch.OutOfMemoryError):
        both_passes(model, [AGAIN] * 4 + [KEEP])
    assert joined == []  # with no copies there is nothing to wait for, and in a graph it would be an error


@pytest.mark.parametrize("plan", [[KEEP] * 5, [Saving.RECOMPUTE] * 5])
def test_a_pass_without_copies_waits_for_none(model: Any, plan: list[Saving], monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be being recorded as a CUDA graph, which a wait for another stream would spoil."""
    both_passes(model, [AWAY] * 4 + [KEEP])
    for name in ("begin", "send", "fetch", "wait", "join"):
        monkeypatch.setattr(HostInputs, name, lambda self, *arguments: pytest.fail("a copy of a pass that has none"))
    both_passes(model, plan)


def test_a_backward_pass_that_comes_too_late(model: Any) -> None:
    decoder = model.model.model
    decoder.planner.forced = [AWAY] * 4 + [KEEP]
    ids = torch.arange(5, 25)[None]
    first = decoder(input_ids=ids).last_hidden_state
    decoder(input_ids=ids)
    with pytest.raises(AssertionError, match="a later forward pass"):
        first.sum().backward()


# --- which layers

SPEC = DecoderSpec("qwen3", 36, 4096, 12288, Heads(32, 8, 128), 151936, 1e-6, True, (False, False), False)
GIB = 2**30


def planned(budget: float, host: float = 64, spec: DecoderSpec = SPEC) -> Planner:
    """The planner of a GPU with so many GiB for activations, and of a machine with so many for inputs."""
    planner = Planner(spec, GPU)
    planner.budget, planner.host_budget, planner.extra = int(budget * GIB), int(host * GIB), 224
    return planner


def test_as_few_layers_as_do_not_fit_leave_their_inputs() -> None:
    planner = planned(8.2)
    counts = []
    for tokens in range(1024, 60_000, 1024):
        plan = planner.plan(tokens)
        away = plan.count(AWAY)
        counts.append(away)
        assert away == planner.offloaded(tokens)
        if away == 0:
            continue
        assert plan == [AWAY] * away + [AGAIN] * (35 - away) + [KEEP]
        left = planner.budget / 1.1 - workspace(SPEC, tokens, 2)
        assert launched(SPEC, tokens, 2, away, 224) <= left or away == 35
        assert away == 1 or launched(SPEC, tokens, 2, away - 1, 224) > left
        assert planner.room(tokens) == launched(SPEC, tokens, 2, away, 224)
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 35)
    assert len(set(counts)) > 20
    longest = counts.index(next(count for count in counts if count)) * 1024
    assert 18_000 < longest < 21_000  # what an H200 limited to 14.2 GiB trains without: about 20,000


def test_what_fits_is_planned_as_before() -> None:
    """Kept as far as there is room; then every layer is recomputed; only then inputs leave."""
    planner = planned(8.2)
    assert planner.plan(2048) == [KEEP] * 36
    assert set(planner.plan(4096)) == {KEEP, DROP}
    assert set(planner.plan(12_288)) == {AGAIN, DROP, KEEP}
    assert planner.plan(19_000) == [AGAIN] * 36
    planner.arena = planner.room(4096)  # a graph has been made: longer ones are planned as if it had not
    assert planner.plan(30_000) == planned(8.2).plan(30_000)
    assert AWAY in planner.plan(30_000)


def test_the_machine_needs_room_too(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = 30_000
    needed = -(-tokens // 128) * 128 * 8192 * planned(8.2).offloaded(tokens)
    assert AWAY in planned(8.2, needed / GIB).plan(tokens)
    assert planned(8.2, (needed - 1) / GIB).plan(tokens) == [AGAIN] * 36
    planner = planned(8.2)
    planner.host_budget = None
    monkeypatch.setattr(planner_module, "free_memory", lambda: needed + needed // 4)
    assert planner.plan(tokens) == [AGAIN] * 36  # a quarter stays free
    planner.host_budget = None
    monkeypatch.setattr(planner_module, "free_memory", lambda: needed + needed // 3 + 2)
    assert AWAY in planner.plan(tokens)


def test_low_memory_offloads_what_does_not_fit_recomputed() -> None:
    planner = planned(8.2)
    planner.recompute_all()
    assert planner.plan(2048) == [AGAIN] * 36
    away = planner.offloaded(30_000)
    assert away == planned(8.2).offloaded(30_000) > 0
    assert planner.plan(30_000) == [AWAY] * away + [AGAIN] * (36 - away)
    planner.offload_all()
    assert planner.plan(128) == [AWAY] * 35 + [AGAIN]
    assert planner.recomputes_all
    planner.forced = AGAIN
    planner.offloads_all = False
    planner.tighten()
    assert planner.offloaded(30_000) > away  # after memory ran out


def test_memory_that_is_forced_or_not_there_is_left_alone() -> None:
    planner = planned(8.2)
    for forced in (KEEP, [AGAIN] * 36):
        planner.forced = forced
        assert planner.offloaded(60_000) == 0
    on_cpu = Planner(SPEC, CPU)
    assert on_cpu.plan(60_000) == [KEEP] * 36
    assert on_cpu.budget is None


def test_one_layer_needs_what_its_widest_moment_does() -> None:
    """Numbers a token of one backward pass; with many heads attention's is the widest."""
    narrow = DecoderSpec("qwen3", 28, 1024, 3072, Heads(16, 8, 128), 151936, 1e-6, True, (False, False), True)
    for spec, numbers in ((SPEC, 59_456 + 8192), (narrow, 29_696)):
        weight = 2 * spec.intermediate * spec.hidden * 2
        assert workspace(spec, 1000, 2) - weight == 2 * 1000 * numbers


def test_blocks_are_powers_of_two() -> None:
    assert BLOCK & (BLOCK - 1) == 0
