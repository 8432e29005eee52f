"""The fast engine on a CUDA machine (make gpu): exactness against peft, graphs against launches, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.kernels import attention, float8, hopper, swiglu
from unsloth_factory.model.fast import pace
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.planner import workspace
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TUNING = TuningSettings(lora_r=8, lora_alpha=16, quantization_bit=4)
LENGTHS = (300, 17, 500, 1, 206)
LONG, DEEP = (20_000, 1000), 12
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def wide(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models wide enough for real kernels: hidden size 512, heads of 128, four layers ("deep": twelve)."""
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parent.parent / "conftest.py"))
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            name, layers = ("qwen3", DEEP) if family == "deep" else (family, 4)
            folder = root.make_random_model(tmp_path_factory.mktemp(family), family=name, layers=layers, hidden=512)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
            made[family] = folder
        return made[family]

    return make


def load(
    folder: Path,
    engine: str,
    dtype: torch.dtype,
    bits: int | None = 4,
    tuning: TuningSettings = TUNING,
    matmul: str = "exact",
) -> LoadedModel:
    settings: Any = {"model": str(folder), "engine": engine, "matmul": matmul}
    loaded = load_model(
        ModelSettings(**settings), quantization_bit=bits, dtype=dtype, for_training=True, tuning=tuning,
        device=torch.device("cuda:0"),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:
            parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.device)
    loaded.model.train()
    return loaded


def run(loaded: LoadedModel, lengths: tuple[int, ...] = LENGTHS) -> tuple[torch.Tensor, Gradients]:
    """(hidden states [T, h] float32, gradients) of one packed row, on the CPU."""
    loaded.model.zero_grad()
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 250, (1, total), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    hidden = loaded.hidden_states(ids, positions, None)[0]
    weights = torch.randn(hidden.shape, generator=generator).to(hidden)
    (hidden.float() * weights.float()).sum().backward()
    named = loaded.model.named_parameters()
    return hidden.detach().float().cpu(), {name: p.grad.cpu().clone() for name, p in named if p.grad is not None}


def flat(gradients: Gradients) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "mistral"])
def test_as_exact_as_peft(wide: Any, family: str, dtype: torch.dtype) -> None:
    """Not farther from float32 on the same NF4 weights than transformers + peft + bitsandbytes are."""
    reference = run(load(wide(family), "standard", torch.float32))
    standard, fast = (run(load(wide(family), engine, dtype)) for engine in ("standard", "fast"))
    assert error(fast[0], reference[0]) <= 1.2 * error(standard[0], reference[0])
    ours, theirs, exact = (flat(found[1]) for found in (fast, standard, reference))
    assert error(ours, exact) <= 1.2 * error(theirs, exact), (error(ours, exact), error(theirs, exact))
    for name, gradient in fast[1].items():
        limit = 1.2 * error(standard[1][name], reference[1][name]) + 2e-3
        assert error(gradient, reference[1][name]) <= limit, name
    print(family, dtype, f"{error(ours, exact):.2e} against {error(theirs, exact):.2e}")


@pytest.mark.parametrize("tuning", [{"finetuning_type": "full"}, {"finetuning_type": "freeze", "freeze_last_n": 2}])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_trained_weights_are_about_as_exact_as_by_torch(wide: Any, family: str, tuning: dict[str, Any]) -> None:
    """torch's autocast leaves hidden states between layers in float32, the fast engine has them in 16 bit."""
    settings = TuningSettings(**tuning)
    reference = run(load(wide(family), "standard", torch.float32, None, settings))
    standard, fast = (run(load(wide(family), one, torch.bfloat16, None, settings)) for one in ("standard", "fast"))
    assert error(fast[0], reference[0]) <= 2 * error(standard[0], reference[0])
    for name, gradient in fast[1].items():
        if name in standard[1]:  # of a head that nothing reads the fast engine has zeros
            limit = 2 * error(standard[1][name], reference[1][name]) + 5e-3
            assert error(gradient, reference[1][name]) <= limit, name


def test_dropout_in_graphs_and_launches(wide: Any) -> None:
    """Each replay drops what its seed says, the same numbers as single launches do."""
    loaded = load(wide("qwen3"), "fast", torch.bfloat16, tuning=replace(TUNING, lora_dropout=0.3))
    graphs, found = loaded.decoder.graphs, []
    for decoder_graphs, seed in ((graphs, 1), (graphs, 1), (graphs, 2), (None, 1), (None, 2)):
        loaded.decoder.graphs = decoder_graphs
        torch.manual_seed(seed)
        found.append(run(loaded))
    replayed, again, other, launched, other_launched = found
    for one, same in ((replayed, again), (replayed, launched), (other, other_launched)):
        assert error(one[0], same[0]) < 2e-2
        assert error(flat(one[1]), flat(same[1])) < 3e-2
    assert error(flat(other[1]), flat(replayed[1])) > 0.1
    loaded.model.eval()
    assert error(run(loaded)[0], run(load(wide("qwen3"), "fast", torch.bfloat16))[0]) < 2e-2


def test_the_last_layer_for_some_positions(wide: Any) -> None:
    """Between two graphs; hidden states and gradients of a loss that reads these positions alone."""
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    graphs, index = loaded.decoder.graphs, torch.arange(1, 1000, 3)
    ids = torch.randint(5, 250, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    inputs = ids, torch.cat([torch.arange(n) for n in LENGTHS])[None], None
    found = []
    for decoder_graphs in (graphs, graphs, None):
        loaded.decoder.graphs = decoder_graphs
        loaded.model.zero_grad()
        rows = loaded.hidden_rows(*inputs, index)
        (
            rows.float() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1)).to(rows.device)
        ).sum().backward()
        named = loaded.model.named_parameters()
        found.append((rows.detach().float().cpu(), {n: p.grad.cpu().clone() for n, p in named if p.grad is not None}))
    assert [bucket.whole for bucket in graphs._graphs] == [False]
    for other in found[1:]:
        assert error(found[0][0], other[0]) < 2e-2
        assert error(flat(found[0][1]), flat(other[1])) < 3e-2


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < float8.CAPABILITY,
    reason="GPUs before RTX 40 and H100 have no float8",
)
def test_products_in_float8(wide: Any) -> None:
    """In graphs and by launches, about as far off as on a CPU; how far is said."""
    exact, loaded = (load(wide("qwen3"), "fast", torch.bfloat16, matmul=one) for one in ("exact", "fp8"))
    assert "not exact" in loaded.engine_reason
    wanted, replayed = run(exact), run(loaded)
    loaded.decoder.graphs = None
    launched = run(loaded)
    for found in (replayed, launched):
        assert 0.01 < error(found[0], wanted[0]) < 0.15
        assert float(torch.cosine_similarity(flat(found[1]), flat(wanted[1]), dim=0)) > 0.98
    assert error(replayed[0], launched[0]) < 5e-2
    print(loaded.engine_reason)


def test_the_kernel_of_older_cards(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(wide("qwen3"), "fast", torch.float16)
    newer = run(loaded)
    monkeypatch.setattr(attention, "backend", lambda device: "efficient")
    loaded.decoder.graphs.drop()
    for _ in range(2):  # as graphs, and as launches
        older = run(loaded)
        assert error(older[0], newer[0]) < 2e-3
        assert error(flat(older[1]), flat(newer[1])) < 5e-3
        loaded.decoder.graphs = None


def test_graphs_are_launches(wide: Any) -> None:
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    graphs = loaded.decoder.graphs
    assert graphs is not None
    for lengths in (LENGTHS, (1024,), (40,) * 20, (7,), LENGTHS):
        replayed = run(loaded, lengths)
        again = run(loaded, lengths)
        loaded.decoder.graphs = None
        launched = run(loaded, lengths)
        loaded.decoder.graphs = graphs
        # Rows of other lengths may go to other matrix kernels, and flash-attention adds up in any order. Graphs launch
        # it for 512 tokens at least, where it may be FlashAttention-4's: short rows were 0.012 apart then.
        assert error(replayed[0], launched[0]) < 2e-2
        assert error(flat(replayed[1]), flat(launched[1])) < 3e-2
        assert error(flat(again[1]), flat(replayed[1])) < 1e-2


def test_what_is_kept_changes_next_to_nothing(wide: Any) -> None:
    """Recomputed values are the same bits; only flash-attention's sums come in another order."""
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    loaded.decoder.graphs = None
    found = []
    for saving in Saving:
        loaded.decoder.planner.forced = saving
        found.append(run(loaded))
    assert all(torch.equal(found[0][0], other[0]) for other in found[1:])
    assert all(error(flat(found[0][1]), flat(other[1])) < 5e-3 for other in found[1:])


def test_auto_is_fast_where_the_kernels_are_sound(wide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(model=str(wide("qwen3")), engine="auto")
    loaded = load_model(settings, quantization_bit=4, for_training=True, prefers="fast")
    assert loaded.engine == "fast", loaded.engine_reason
    right = swiglu.launch_backward
    monkeypatch.setattr(swiglu, "launch_backward", lambda dout, gate_up: right(dout, gate_up) * 1.1)
    loaded = load_model(settings, quantization_bit=4, for_training=True, prefers="fast")
    assert loaded.engine == "standard"
    assert "of a layer is off by" in loaded.engine_reason


def test_what_sizes_of_micro_batches_take(wide: Any) -> None:
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    before = run(loaded)
    costs = loaded.micro_batch_costs(4096)
    assert len(costs) == 32
    assert 0 < costs[0] < costs[-1] < 32 * 2 * costs[0]
    assert torch.equal(run(loaded)[0], before[0])


def test_measuring_all_sizes_takes_no_more_memory_than_the_largest(wide: Any) -> None:
    layer = load(wide("qwen3"), "fast", torch.bfloat16).decoder.stack[0]

    def taken(sizes: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        sizes()
        return torch.cuda.max_memory_reserved() - before

    largest = taken(lambda: pace._milliseconds(layer, 4096))
    assert largest > 2**20
    assert taken(lambda: pace.measure(layer, 4096)) <= 1.1 * largest


def test_recording_does_not_wait_for_what_runs(wide: Any) -> None:
    """Graphs of new sizes are made while the GPU still computes; what it computes is not disturbed."""
    loaded, sizes = load(wide("qwen3"), "fast", torch.bfloat16), ((300, 200), (900, 100), (64,), (1500,))
    run(loaded, (2000,))  # the longest first, as in a training: what follows needs no more room
    alone = [run(loaded, lengths) for lengths in sizes]
    loaded.decoder.graphs.drop()
    run(loaded, (2000,))
    torch.cuda.synchronize()
    ids, busy = torch.arange(5, 205)[None], torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # a second
    busy.record()
    loaded.hidden_states(ids, torch.arange(200)[None], None)
    assert not busy.query()
    for lengths, (hidden, gradients) in zip(sizes, alone, strict=True):
        again = run(loaded, lengths)
        assert torch.equal(again[0], hidden)
        assert error(flat(again[1]), flat(gradients)) < 5e-3


def test_memory_that_runs_out_drops_the_graphs(wide: Any) -> None:
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    before = run(loaded)
    budget = loaded.decoder.planner.budget
    loaded.give_up_memory()
    assert not loaded.decoder.graphs._graphs
    assert loaded.decoder.planner.budget < budget
    assert error(flat(run(loaded)[1]), flat(before[1])) < 1e-2


def test_a_backward_pass_that_comes_too_late(wide: Any) -> None:
    loaded = load(wide("qwen3"), "fast", torch.bfloat16)
    ids, positions = torch.arange(5, 25)[None], torch.arange(20)[None]
    first = loaded.hidden_states(ids, positions, None)
    loaded.hidden_states(ids, positions, None)
    with pytest.raises(AssertionError, match="a later forward pass"):
        first.sum().backward()


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same kernels each time; and new memory is full of NaN, so that nobody reads before a copy is done."""
    monkeypatch.setattr(hopper, "takes", lambda *arguments: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def three_micro_batches(loaded: LoadedModel, plan: list[Saving] | None) -> tuple[list[torch.Tensor], Gradients, int]:
    """(hidden states, gradients added up, peak bytes) of three of different lengths, without a wait in between."""
    decoder = loaded.decoder
    decoder.planner.forced = plan
    loaded.model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, found = torch.cuda.memory_allocated(), []
    for lengths in (LONG, (sum(LONG) // 2,), LONG[::-1]):
        generator = torch.Generator().manual_seed(len(found))
        ids = torch.randint(5, 250, (1, sum(lengths)), generator=generator)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        hidden = loaded.hidden_states(ids, positions, None)
        found.append(hidden.detach()[0, ::7].clone())
        hidden.backward(torch.ones_like(hidden))
        del hidden
    peak = torch.cuda.max_memory_allocated() - before
    gradients = {name: p.grad.clone() for name, p in loaded.model.named_parameters() if p.requires_grad}
    return found, gradients, peak


def test_inputs_in_pinned_memory(wide: Any, repeatable: None) -> None:
    """The same as with every input on the GPU, in less of its memory; mixed with other plans too."""
    loaded = load(wide("deep"), "fast", torch.bfloat16)
    loaded.decoder.graphs = None
    three_micro_batches(loaded, [Saving.RECOMPUTE] * DEEP)  # kernels are compiled, workspaces allocated
    wanted, gradients, most = three_micro_batches(loaded, [Saving.RECOMPUTE] * DEEP)
    mixed = [Saving.OFFLOAD] * 5 + [Saving.RECOMPUTE, Saving.OFFLOAD, Saving.DROP_GATE_UP, Saving.OFFLOAD]
    for plan in ([Saving.OFFLOAD] * (DEEP - 1) + [Saving.KEEP], [Saving.OFFLOAD] * DEEP, [*mixed, *[Saving.KEEP] * 3]):
        hidden, found, peak = three_micro_batches(loaded, plan)
        assert all(torch.equal(one, other) for one, other in zip(hidden, wanted, strict=True))
        # what is computed again are the same bits, but flash-attention's sums come in any order
        assert error(flat(found), flat(gradients)) < 5e-3, plan
        if plan[: DEEP - 1] == [Saving.OFFLOAD] * (DEEP - 1):
            # eleven inputs fewer, one on its way; the last layer's own do not lie beside those of another layer
            assert most - peak > 8 * sum(LONG) * 512 * 2
        print(f"peak of {peak / 2**20:,.0f} MiB instead of {most / 2**20:,.0f}")
    host = loaded.decoder.host_inputs
    assert all(block.is_pinned() for block in host._blocks)
    assert host.size > 0
    loaded.give_up_memory()
    assert host.size == 0


def test_what_does_not_fit_goes_without_graphs(wide: Any, repeatable: None) -> None:
    """The planner's own choice, when its memory is too small: graphs give way, and come back for short rows."""
    loaded = load(wide("deep"), "fast", torch.bfloat16)
    decoder, graphs = loaded.decoder, loaded.decoder.graphs
    before = run(loaded)
    assert graphs._graphs
    wanted = run(loaded, LONG)
    decoder.planner.budget = workspace(decoder.spec, sum(LONG), 2) - 2**28
    found = run(loaded, LONG)
    assert decoder.planner.plan(sum(LONG)) == [Saving.OFFLOAD] * (DEEP - 1) + [Saving.KEEP]
    assert not graphs._graphs
    assert decoder.host_inputs.size > 0
    assert error(found[0], wanted[0]) < 2e-2
    assert error(flat(found[1]), flat(wanted[1])) < 3e-2
    again = run(loaded)
    assert graphs._graphs
    assert error(flat(again[1]), flat(before[1])) < 2e-2
    loaded.offload_layers()
    assert decoder.planner.plan(128) == [Saving.OFFLOAD] * (DEEP - 1) + [Saving.RECOMPUTE]
    assert error(flat(run(loaded)[1]), flat(before[1])) < 3e-2
