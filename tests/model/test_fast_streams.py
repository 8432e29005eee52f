"""The copies of offloaded inputs are ordered as a GPU's two streams need it: a model of streams, checked on a CPU.

Each operation belongs to the stream that is current when it is issued. What a stream knows of the other one's progress
it has by waiting (vector clocks: Lamport 1978, Mattern 1989). Memory that one stream writes must be known to be ready
by the other that reads it, and to be no longer in use by the other when it is written or given back, because the next
tensor of the computing stream may lie there at once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.kernels.attention import Documents
from unsloth_factory.model.fast import offload
from unsloth_factory.model.fast.layer import Layer, Row, Saving
from unsloth_factory.model.fast.load import FolderWeights, load_fast
from unsloth_factory.model.fast.offload import HostInputs
from unsloth_factory.model.lora import attach_lora

CPU = torch.device("cpu")
LAYERS, TOKENS = 5, 20
PLAN = [Saving.OFFLOAD] * 3 + [Saving.RECOMPUTE, Saving.KEEP]


class Stream:
    """How far it is, and how far it knows the other to be."""

    def __init__(self) -> None:
        self.clock: dict[Stream, int] = {self: 0}

    def wait_event(self, event: dict[Stream, int]) -> None:
        for stream, count in event.items():
            self.clock[stream] = max(self.clock.get(stream, 0), count)

    def record_event(self) -> dict[Stream, int]:
        return dict(self.clock)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        pass


class Use:
    """How a piece of memory was last used: when each stream touched it, and who wrote it."""

    def __init__(self, stream: Stream) -> None:
        self.touched = {stream: stream.clock[stream]}
        self.writer = stream


class Streams(TorchDispatchMode):
    """Runs everything at once, and notes what a GPU might do in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = self.current = Stream()
        self.faults: list[str] = []
        self.copies = 0
        self._uses: dict[int, Use] = {}
        self._host: set[int] = set()

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty(self, *shape: Any, pin_memory: bool = False, device: Any = None, **options: Any) -> torch.Tensor:
        made = torch.empty(*shape, **options)
        if pin_memory:
            self._host.add(made.untyped_storage()._cdata)
        return made

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        stream = self.current
        stream.clock[stream] += 1
        self.copies += stream is not self.computing and function._schema.name == "aten::copy_"
        written = [
            value
            for argument, value in zip(function._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        written += [value for name, value in (kwargs or {}).items() if name == "out"]
        changed = {t.untyped_storage()._cdata for t in tree_leaves(written) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor):
                self._use(tensor.untyped_storage(), function._schema.name, changed)
        return result

    def _use(self, storage: Any, name: str, changed: set[int]) -> None:
        which, stream = storage._cdata, self.current
        if which in self._host:
            return
        if which not in self._uses:
            self._uses[which] = Use(self.computing)
            weakref.finalize(storage, self._freed, which)
        use = self._uses[which]
        for other, count in use.touched.items():
            matters = which in changed or other is use.writer
            if matters and other is not stream and stream.clock.get(other, 0) < count:
                self.faults.append(f"{name} does not wait for the other stream")
        use.touched[stream] = stream.clock[stream]
        if which in changed:
            use.writer = stream

    def _freed(self, which: int) -> None:
        for other, count in self._uses.pop(which).touched.items():
            if self.computing.clock.get(other, 0) < count:
                self.faults.append("memory is given back while the other stream uses it")


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    from transformers import AutoConfig

    root = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parent.parent / "conftest.py"))
    folder = root.make_random_model(tmp_path / "deep", layers=LAYERS)
    fast = load_fast(FolderWeights(folder, CPU, torch.float32), AutoConfig.from_pretrained(folder), quantized=False)
    fast = attach_lora(fast, TuningSettings(lora_r=4), 7)
    fast.model.model.bind()
    return fast.model.model


@pytest.fixture
def streams(model: Any, monkeypatch: pytest.MonkeyPatch) -> Streams:
    """The decoder's inputs are offloaded as on a GPU, in streams of the model."""
    made = Streams()
    cuda = SimpleNamespace(
        Stream=lambda device: Stream(), current_stream=lambda device: made.current, stream=made.within
    )
    monkeypatch.setattr(offload, "torch", SimpleNamespace(empty=made.empty, uint8=torch.uint8, cuda=cuda))
    model.host_inputs = HostInputs(SimpleNamespace(type="cuda"), block=1000)  # type: ignore[arg-type]
    return made


def micro_batch(decoder: Any, streams: Streams) -> None:
    """Both passes of one."""
    row = Row(*decoder.table.of(torch.arange(TOKENS)), Documents.of([TOKENS], CPU))
    with torch.no_grad(), streams:
        last, saved = decoder.forward_stack(torch.randn(TOKENS, decoder.spec.hidden), row, PLAN)
        handed = [last]
        del last
        decoder.adapter.prepare()
        decoder.backward_stack(torch.ones(TOKENS, decoder.spec.hidden), handed.pop(), saved, row)


def test_nobody_reads_or_writes_too_early(model: Any, streams: Streams) -> None:
    for _ in range(3):
        micro_batch(model, streams)
    assert streams.copies >= 3 * 2 * 3
    assert streams.faults == []


def test_memory_of_a_pass_that_fails_is_given_back_in_time(
    model: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of an input which is on its way back when the layer above fails."""
    right = Layer._mlp_backward

    def fail(self: Layer, *arguments: Any) -> torch.Tensor:
        if self is model.stack[3]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, *arguments)

    monkeypatch.setattr(Layer, "_mlp_backward", fail)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            micro_batch(model, streams)
    assert streams.copies > 2 * LAYERS
    assert streams.faults == []


@pytest.mark.parametrize("forgotten", ["wait", "_mark", "_beside"])
def test_the_model_sees_what_is_forgotten(
    model: Any, streams: Streams, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    """Without any one of the waits something could go wrong."""
    if forgotten == "_beside":
        monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    else:
        monkeypatch.setattr(HostInputs, forgotten, lambda self, away: None)
    micro_batch(model, streams)
    assert streams.faults
