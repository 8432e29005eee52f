"""The rest of the last layer for some positions alone: between CUDA graphs, which a CPU replays op by op here."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.kernels import attention
from unsloth_factory.kernels.rotary import Heads
from unsloth_factory.model.fast import self_check
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.graphs import Graphs
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.spec import DecoderSpec
from unsloth_factory.model.fast.tail import Tail, pays
from unsloth_factory.model.load import load_model

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fast_models import CPU, TUNING, both, same  # noqa: E402

TOKENS = 200


class Recorded:
    """As much of a `torch.cuda.CUDAGraph` as is used: replayed, it does all that was done while it was captured."""

    made = 0

    def __init__(self) -> None:
        self.done: list[tuple[Any, ...]] = []
        self._mode = _Mode(self.done)
        Recorded.made += 1

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        self._mode.__enter__()

    def capture_end(self) -> None:
        self._mode.__exit__(None, None, None)

    def replay(self) -> None:
        for func, args, kwargs, outputs in self.done:
            found = func(*args, **kwargs)
            for output, value in zip(tree_leaves(outputs), tree_leaves(found), strict=True):
                if isinstance(output, torch.Tensor) and output.data_ptr() != value.data_ptr():
                    output.copy_(value)


class _Mode(TorchDispatchMode):
    def __init__(self, done: list[tuple[Any, ...]]) -> None:
        super().__init__()
        self.done = done

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, outputs))
        return outputs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(Graphs, "_warm_up", lambda self, x: None)
    # places for documents that are not used are empty; what attends to padding behind the one that there is has no loss
    monkeypatch.setattr(attention, "_parts", lambda documents: [slice(0, documents.longest)])


def micro_batch(model: Any, positions: list[int], tokens: int = TOKENS) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(hidden states of some positions, gradients) of one document; a loss of these positions alone."""
    model.zero_grad()
    index = torch.tensor(positions)
    inputs = {
        "input_ids": torch.randint(5, 300, (1, tokens), generator=torch.Generator().manual_seed(tokens)),
        "position_ids": torch.arange(tokens)[None],
    }
    hidden = model.get_base_model().model(**inputs, use_cache=False, index=index).last_hidden_state
    weights = torch.randn(1, tokens, hidden.shape[-1], generator=torch.Generator().manual_seed(2))
    (hidden * weights[:, index]).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def with_graphs(decoder: Any) -> Graphs:
    decoder.graphs, decoder.planner.budget = Graphs(decoder), 10**9
    return decoder.graphs


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_some_positions_are_as_exact_as_all(family_dir, family, cuda, monkeypatch):
    """Hidden states and the gradients of every LoRA matrix, those below the last layer too, in any order of rows."""
    _, fast = both(family_dir(family))
    few, many = list(range(3, 100, 2)), list(range(TOKENS))
    cases = [(few, TOKENS), (many, TOKENS), ([70], 130), (few[::-1], TOKENS), (few, TOKENS)]
    launched = [micro_batch(fast, *case) for case in cases]
    tails: list[int] = []
    forward = Tail.forward
    monkeypatch.setattr(Tail, "forward", lambda self, *given: tails.append(len(given[2])) or forward(self, *given))
    graphs = with_graphs(fast.get_base_model().model)
    for case, expected in zip(cases, launched, strict=True):
        same(micro_batch(fast, *case), expected)
    assert tails == [len(few), 1, len(few), len(few)]  # not where all positions are asked for
    assert sorted((bucket.tokens, bucket.whole) for bucket in graphs._graphs) == [(256, False), (256, True)]


def test_what_the_tail_keeps_lies_behind_the_layers(random_model_dir, cuda, monkeypatch):
    """In the room that a whole last layer has, or in memory of its own; never where the layers keep theirs."""
    _, fast = both(random_model_dir)
    expected = micro_batch(fast, [5, 100, 199])
    decoder = fast.get_base_model().model
    graphs = with_graphs(decoder)
    for _ in range(2):
        same(micro_batch(fast, [5, 100, 199]), expected)
    graph = next(iter(graphs._graphs.values()))
    assert 0 < graph.kept < graph.arena.used
    assert graph.arena.outside == 0
    monkeypatch.setattr(graph.arena, "_block", graph.arena._block[: graph.kept])
    same(micro_batch(fast, [5, 100, 199]), expected)
    assert graph.arena.outside > 0


@pytest.mark.parametrize("plan", [[Saving.DROP_GATE_UP, Saving.KEEP], [Saving.RECOMPUTE] * 2])
def test_only_a_last_layer_that_keeps_all_has_a_tail(random_model_dir, cuda, plan):
    _, fast = both(random_model_dir)
    expected = micro_batch(fast, [5, 100, 199])
    decoder = fast.get_base_model().model
    graphs = with_graphs(decoder)
    decoder.planner.forced = plan
    same(micro_batch(fast, [5, 100, 199]), expected)
    assert [bucket.whole for bucket in graphs._graphs] == [plan[-1] is not Saving.KEEP]


def test_dropout_in_the_tail(random_model_dir, cuda):
    """A seed of its own for each micro-batch, the same one forwards and backwards."""
    _, fast = both(random_model_dir, tuning=replace(TUNING, lora_dropout=0.3))
    decoder = fast.get_base_model().model
    with_graphs(decoder)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(micro_batch(fast, [5, 100, 199]))
    same(found[1], found[0])
    assert not torch.allclose(found[2][0], found[0][0], rtol=1e-3)
    # a step along a matrix' gradient changes the loss by the gradient's square, if it is that of what was computed
    weights = torch.randn(1, TOKENS, 64, generator=torch.Generator().manual_seed(2))[:, [5, 100, 199]]
    for which in "AB":
        name = f"base_model.model.model.layers.1.mlp.down_proj.lora_{which}.default.weight"
        parameter, gradient = fast.get_parameter(name), found[0][1][name]
        step, losses = 1e-2 / float(gradient.norm()), []
        for sign in (1, -1):
            parameter.data += sign * step * gradient
            torch.manual_seed(1)
            losses.append(float((micro_batch(fast, [5, 100, 199])[0].double() * weights).sum()))
            parameter.data -= sign * step * gradient
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(gradient.square().sum()), rel=2e-2), which


@pytest.mark.parametrize("wrong", [None, "forward", "backward"])
def test_it_is_looked_at_before_a_training_trusts_it(random_model_dir, cuda, monkeypatch, wrong):
    _, fast = both(random_model_dir)
    decoder = fast.get_base_model().model
    with_graphs(decoder)
    monkeypatch.setattr(self_check, "LENGTHS", (231,))
    micro_batch(fast, [5, 100, 199])
    before = {name: p.grad.clone() for name, p in fast.named_parameters() if p.requires_grad}
    if wrong is not None:
        right = getattr(Tail, wrong)

        def off(*given: Any) -> tuple[Any, Any]:
            first, second = right(*given)
            return first * 1.2, second

        monkeypatch.setattr(Tail, wrong, off)
    found = self_check.problem(decoder)
    if wrong is None:
        assert found is None
    else:
        what = {"forward": "output of some positions", "backward": "gradient from some positions"}[wrong]
        assert f"the {what} is off by" in str(found)
    for name, gradient in before.items():
        assert torch.equal(fast.get_parameter(name).grad, gradient)
    fast.zero_grad()
    self_check.problem(decoder)
    assert all(parameter.grad is None for parameter in fast.parameters())


def test_when_it_pays():
    spec = DecoderSpec("qwen3", 36, 4096, 12288, Heads(32, 8, 128), 151936, 1e-6, True, (False, False), False)
    assert pays(spec, 2560, 1280)
    assert pays(spec, 2560, 1920)
    assert not pays(spec, 2560, 1921)
    assert not pays(spec, 2560, 0)
    assert not pays(spec, 8192, 4096)  # its temporaries would need more than is kept free


@pytest.mark.parametrize("engine", ["standard", "fast"])
def test_rows_of_padded_and_packed_batches(random_model_dir, engine):
    """Positions count in the whole batch, padding included."""
    loaded = load_model(
        ModelSettings(model=str(random_model_dir), engine=engine), dtype=torch.float32, device=CPU, for_training=True
    )
    loaded.model.train()
    ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 9:] = 0
    positions, index = torch.arange(12).expand(2, 12), torch.tensor([2, 8, 12, 23])
    for given in ((ids, positions, mask), (ids, positions, None), (ids[:1], positions[:1], None)):
        chosen = index[index < given[0].numel()]
        rows = loaded.hidden_rows(*given, chosen)
        whole = loaded.hidden_states(*given)
        assert torch.equal(rows, whole.reshape(-1, whole.shape[-1])[chosen])


def test_an_arena_goes_back_to_where_the_tail_begins():
    arena = Arena(4 * 640, torch.float32, CPU)
    kept = arena.take(2, 60)
    used = arena.used
    tail = arena.take(3, 64)
    arena.rewind(used)
    assert arena.take(3, 64).data_ptr() == tail.data_ptr()
    arena.rewind()
    assert arena.take(2, 60).data_ptr() == kept.data_ptr()
