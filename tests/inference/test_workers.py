"""Batches side by side on a CPU: the same answers, cores shared out, nothing left running."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.data.types import TokenSample
from unsloth_factory.inference.generate import generate
from unsloth_factory.inference.perplexity import answer_losses
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.workers import MOST_WORKERS, run_batches
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel


@pytest.fixture(scope="module")
def loaded(random_model_dir) -> LoadedModel:
    return load_model(ModelSettings(model=str(random_model_dir)))


@pytest.fixture
def cores():
    """As many as asked for, whatever the machine has; as before at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_answers_and_losses_are_those_of_one_thread(loaded, cores):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 300, size=n).tolist() for n in (3, 30, 12, 7, 22, 9)]
    trained = [np.arange(len(prompt)) > 1 for prompt in prompts]
    rows = zip(prompts, trained, strict=True)
    samples = [TokenSample(np.array(ids, dtype=np.int32), mask, "x") for ids, mask in rows]
    drawn = Sampling(temperature=1.0, seed=3)
    answers, losses, seen = [], [], []
    for count in (1, 3):
        cores(count)
        answers += generate(
            loaded, prompts, stop_ids=(5,), max_new_tokens=20, sampling=drawn, batch_size=2,
            on_progress=lambda *progress: seen.append(progress),
        )  # fmt: skip
        losses += [(loss.tokens, loss.total) for loss in answer_losses(loaded, samples, batch_size=2)]
    assert answers[:6] == answers[6:]
    assert np.array(losses[:6]) == pytest.approx(np.array(losses[6:]), rel=1e-6)
    assert seen == [(2, 6), (4, 6), (6, 6)] * 2


def test_batches_run_side_by_side_each_with_its_share_of_the_cores(loaded, cores):
    cores(4)
    together = threading.Barrier(2, timeout=20)  # broken where one batch waits for the other

    def work(batch, stopped):
        together.wait()
        return torch.get_num_threads(), threading.current_thread() is threading.main_thread(), stopped.is_set()

    results = dict((tuple(batch), result) for batch, result in run_batches(loaded, [[0, 1], [2]], work))
    assert results == {(0, 1): (2, False, False), (2,): (2, False, False)}
    assert torch.get_num_threads() == 4


def test_never_more_than_a_few_at_a_time(loaded, cores):
    cores(2 * MOST_WORKERS)
    names = {result for _, result in run_batches(loaded, [[n] for n in range(40)], lambda *_: threading.get_ident())}
    assert len(names) <= MOST_WORKERS
    assert threading.get_ident() not in names


@pytest.mark.parametrize("change", ["one core", "one batch", "quantized", "fast engine", "gpu", "dynamic", "longrope"])
def test_one_at_a_time_where_batches_would_disturb_each_other(random_model_dir, cores, change):
    loaded = load_model(ModelSettings(model=str(random_model_dir)))
    cores(1 if change == "one core" else 3)
    if change == "quantized":
        loaded.quantized = True
    if change == "fast engine":
        loaded.engine = "fast"
    if change == "gpu":
        loaded.device = torch.device("cuda")
    if change in ("dynamic", "longrope"):
        loaded.model.model.rotary_emb.rope_type = change
    batches = [[0]] if change == "one batch" else [[0], [1], [2]]
    before = torch.get_num_threads()
    found = list(run_batches(loaded, batches, lambda *_: (threading.get_ident(), torch.get_num_threads())))
    assert found == [(batch, (threading.get_ident(), before)) for batch in batches]


@pytest.mark.parametrize("ending", ["error", "closed"])
def test_who_gives_up_leaves_nothing_running(loaded, cores, ending):
    cores(2)
    begun, told = [], []

    def work(batch, stopped):
        begun.append(batch)
        if batch == [0]:
            if ending == "error":
                raise MemoryError("one batch")
            return
        told.append(stopped.wait(timeout=20))  # a decoder looks at it at each token

    results = run_batches(loaded, [[n] for n in range(9)], work)
    if ending == "error":
        with pytest.raises(MemoryError, match="one batch"):
            list(results)
    else:
        assert next(results) == ([0], None)
        results.close()
    assert told == [True] * len(told), "it was not told to stop"
    assert len(begun) <= 3, "further batches were begun"
    assert torch.get_num_threads() == 2
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]


def test_an_answer_under_way_ends_when_told(loaded, cores, monkeypatch):
    """One batch fails at once; the other would write 400 tokens."""
    cores(2)
    from unsloth_factory.inference import generate as module

    steps = []

    class Failing(module.Decoder):
        def __init__(self, loaded, prompts):
            if len(prompts[0]) == 3:
                raise MemoryError("short prompt")
            super().__init__(loaded, prompts)

        def feed(self, tokens):
            steps.append(1)
            super().feed(tokens)

    monkeypatch.setattr(module, "Decoder", Failing)
    with pytest.raises(MemoryError, match="short prompt"):
        generate(loaded, [[1, 2, 3], [4] * 30], stop_ids=(), max_new_tokens=400, batch_size=1)
    assert len(steps) < 300
