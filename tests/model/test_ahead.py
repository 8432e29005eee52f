"""The next 16-bit matrix is made while a product runs: in the order that passes ask for, and without a race."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.fast.ahead import Ahead, Side, Unpacked
from unsloth_factory.model.fast.layer import Saving
from unsloth_factory.model.fast.load import FolderWeights, load_fast
from unsloth_factory.model.lora import attach_lora

CPU = torch.device("cpu")
K, D, R = Saving.KEEP, Saving.DROP_GATE_UP, Saving.RECOMPUTE
MIXED = [[R, K], [D, K], [K, R], [R, D]]
TAKEN = {K: 8, D: 9, R: 11}
"""Matrices that a layer asks for, forwards and backwards; the lowest layer one less."""
Found = list[torch.Tensor]


def build(folder: Path, *, bits: int | None = 4, recompute: bool = False, tuning: TuningSettings | None = None) -> Any:
    from transformers import AutoConfig

    weights = FolderWeights(folder, CPU, torch.float32)
    config = AutoConfig.from_pretrained(folder)
    model = load_fast(weights, config, quantized=bits is not None, recompute=recompute)
    model = attach_lora(model, tuning or TuningSettings(lora_r=4, lora_alpha=8), 7)
    model.get_base_model().model.bind()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.train()


def run(model: Any, plan: list[Saving] | Saving | None = None, seed: int = 0) -> Found:
    """Hidden states and gradients of a packed row."""
    decoder = model.get_base_model().model
    decoder.planner.forced = plan
    model.zero_grad()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (1, 20), generator=generator)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    hidden = decoder(input_ids=ids, position_ids=positions).last_hidden_state
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def equal(first: Found, second: Found) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Watched(Side):
    """Two streams that exist on paper: who has waited for how much of the other's work."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.on_side = False
        self.issued = {"main": 0, "side": 0}
        self.waited = {"main": 0, "side": 0}
        """Of the other stream's work, by each."""

    def fork(self) -> None:
        self.waited["side"] = self.issued["main"]

    @contextmanager
    def running(self) -> Iterator[None]:
        self.on_side = True
        yield
        self.on_side = False

    def join(self) -> None:
        self.waited["main"] = self.issued["side"]


class Races:
    """Every reading and writing of a place is compared with the last writing and reading of it on the other stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        decoder = model.get_base_model().model
        self.found: list[str] = []
        self.side = Watched()
        self.last: dict[tuple[str, int], tuple[str, int]] = {}
        self.overlapped = 0
        decoder.ahead = Ahead(max(f.largest for f in decoder._projections()), torch.float32, self.side, CPU)
        for fused in decoder._projections():
            fused.ahead = decoder.ahead
        make, take = Unpacked.make, Ahead.take

        def made(form: Unpacked, place: torch.Tensor) -> torch.Tensor:
            self.note("write", "side" if self.side.on_side else "main", place.data_ptr())
            return make(form, place)

        def taken(ahead: Ahead, wanted: Unpacked) -> torch.Tensor:
            matrix = take(ahead, wanted)
            self.overlapped += self.side.issued["side"] > self.side.waited["main"]
            self.note("read", "main", matrix.data_ptr())  # the product, issued as soon as the matrix is there
            return matrix

        monkeypatch.setattr(Unpacked, "make", made)
        monkeypatch.setattr(Ahead, "take", taken)

    def note(self, what: str, stream: str, place: int) -> None:
        for other in ("write", "read") if what == "write" else ("write",):
            whose, number = self.last.get((other, place), (stream, 0))
            if whose != stream and self.side.waited[stream] < number:
                self.found.append(f"{what} on the {stream} stream does not wait for a {other} on the {whose} stream")
        self.side.issued[stream] += 1
        self.last[what, place] = stream, self.side.issued[stream]


def test_whatever_a_pass_asks_for_is_there(random_model_dir: Path) -> None:
    model = build(random_model_dir)
    ahead = model.get_base_model().model.ahead
    for saving in Saving:  # what layers ask for is learnt here, as in the small passes before the first graph
        run(model, saving)
    assert ahead.surprises == 0
    for plan in [[saving] * 2 for saving in Saving] + MIXED:
        before = ahead.prepared
        run(model, plan)
        assert ahead.prepared - before == sum(TAKEN[saving] for saving in plan) - 1 - 2  # the first of each pass is not
    assert ahead.surprises == 0


@pytest.mark.parametrize("plan", [K, D, R, *MIXED])
def test_the_same_bits_without_it(random_model_dir: Path, plan: Any) -> None:
    model = build(random_model_dir)
    decoder = model.get_base_model().model
    ahead = [run(model, plan, seed) for seed in (0, 1, 2)]
    assert decoder.ahead.prepared > 0
    decoder.look_ahead(False)
    assert all(equal(found, run(model, plan, seed)) for seed, found in enumerate(ahead))


def test_adapters_on_some_projections(random_model_dir: Path) -> None:
    """Those without one ask for their weight alone."""
    model = build(random_model_dir, tuning=TuningSettings(lora_r=4, lora_target="k_proj,down_proj"))
    decoder = model.get_base_model().model
    found = [run(model, [R, D], seed) for seed in (0, 1)]
    assert decoder.ahead.prepared > 0
    decoder.look_ahead(False)
    assert all(equal(one, run(model, [R, D], seed)) for seed, one in enumerate(found))


def test_no_race(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(random_model_dir)
    races = Races(monkeypatch, model)
    decoder = model.get_base_model().model
    for plan in (K, D, R, *MIXED):
        run(model, plan)
        with torch.no_grad():  # a pass of another kind in between: each matrix when it is needed
            decoder(input_ids=torch.arange(5, 15)[None])
    assert races.found == []
    assert races.side.waited["main"] == races.side.issued["side"]  # nothing is left unjoined
    assert races.overlapped > 50


def test_a_wrong_expectation(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything else is made when it is asked for, and expected the next time."""
    model = build(random_model_dir)
    right = run(model, K)
    races = Races(monkeypatch, model)
    ahead = model.get_base_model().model.ahead
    run(model, K)
    for stage in [("forward", 1, K), ("backward", 1, K), ("backward", 0, K)]:
        order = ahead._known[stage]
        for wrong in ([], order[::-1], order[:2], order[:1] + order):
            ahead._known[stage], ahead.surprises = wrong, 0
            assert equal(run(model, K), right)
            assert ahead.surprises == 1
            assert equal(run(model, K), right)
            assert ahead.surprises == 1
        ahead._known[stage] = order * 2  # more than is asked for
        assert equal(run(model, K), right)
        assert ahead._known[stage] == order
    assert races.found == []


def test_a_pass_that_breaks_off(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(random_model_dir)
    right = run(model, K)
    races = Races(monkeypatch, model)
    run(model, K)
    last = model.get_base_model().model.stack[1]
    with monkeypatch.context() as patch:
        patch.setattr(last, "normed", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(model, K)
        assert races.side.waited["main"] == races.side.issued["side"]
    assert equal(run(model, K), right)
    assert races.found == []
    assert model.get_base_model().model.ahead.surprises == 0


def test_where_memory_is_short_or_nothing_is_to_be_made(random_model_dir: Path) -> None:
    assert build(random_model_dir, bits=None).get_base_model().model.ahead is None
    assert build(random_model_dir, recompute=True).get_base_model().model.ahead is None
    decoder = build(random_model_dir).get_base_model().model
    spec, planner = decoder.spec, decoder.planner
    assert [len(place) for place in decoder.ahead._places] == [2 * spec.intermediate * (spec.hidden + 8)] * 2
    held = planner.workspace(20)
    decoder.recompute_all()
    assert decoder.ahead is None
    assert planner.workspace(20) - held == 2 * spec.intermediate * spec.hidden * 2  # no place of its own any more
