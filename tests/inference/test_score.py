"""Choice scoring: the shared prefix, left-padded batches and the adapter's switch change no log-probability."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.inference import score
from unsloth_factory.inference.score import choice_logprobs
from unsloth_factory.model.load import load_model


@pytest.fixture(scope="module", params=["qwen3", "mistral"])
def loaded(request, pytestconfig, tmp_path_factory):
    """A random model of a family with an adapter that really changes it."""
    root = next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "make_random_model"))
    folder = root.make_random_model(tmp_path_factory.mktemp("scored"), family=request.param)
    model = load_model(ModelSettings(model=str(folder)), for_training=True, tuning=TuningSettings(lora_r=4), seed=1)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def plain(loaded, prompt: list[int], choice: list[int]) -> float:
    """One whole sequence, no cache, no padding, the full logits."""
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + choice]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + place, token]) for place, token in enumerate(choice))


def subject(seed: int, shared: int = 90) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Nine questions of unlike length behind one prefix; four choices of one token, two with several."""
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 500, size=shared).tolist()
    prompts = [prefix + rng.integers(0, 500, size=n).tolist() for n in (40, 3, 38, 37, 1, 25, 24, 23, 39)]
    choices = [[[1], [2], [3], [4]] for _ in prompts]
    choices[3] = [[5, 6, 7], [5, 6, 8], [9], [5, 10]]
    choices[7] = [[11, 12, 13, 14], [15], [16, 17], [18]]
    return prompts, choices


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_to_the_plain_path_with_the_adapter_on_and_off(loaded, adapter, batch_size):
    prompts, choices = subject(3)
    was_training = loaded.model.training
    loaded.model.eval()
    with nullcontext() if adapter else loaded.adapter_disabled():
        expected = [[plain(loaded, p, choice) for choice in row] for p, row in zip(prompts, choices, strict=True)]
    loaded.model.train(was_training)
    with nullcontext() if adapter else loaded.adapter_disabled():
        scores = choice_logprobs(loaded, prompts, choices, batch_size=batch_size)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    if not adapter:
        with pytest.raises(AssertionError):  # the adapter matters at all
            np.testing.assert_allclose(choice_logprobs(loaded, prompts, choices), expected, atol=1e-1, rtol=0)


def test_the_prefix_is_computed_once_and_few_positions_are_padding(loaded, monkeypatch):
    prompts, choices = subject(4)
    seen = []
    original = score.forward

    def spy(loaded, ids, positions, mask, cache, last=1):
        seen.append((ids.shape, int(mask[:, -ids.shape[1] :].sum())))
        return original(loaded, ids, positions, mask, cache, last)

    monkeypatch.setattr(score, "forward", spy)
    choice_logprobs(loaded, prompts, [row[:1] for row in choices], batch_size=4)
    assert seen[0] == ((1, 90), 90)
    computed, real = (sum(shape.numel() for shape, _ in seen[1:]), sum(count for _, count in seen[1:]))
    assert real <= computed <= real / (1 - score.PADDING)
    assert computed < sum(map(len, prompts)) / 4
    assert max(shape[0] for shape, _ in seen) == 4


def test_batches_hold_every_row_once_and_close_at_their_size():
    lengths = [5, 100, 99, 98, 97, 96, 5, 4, 1]
    batches = score._batches(lengths, 4)
    assert sorted(index for batch in batches for index in batch) == list(range(9))
    assert batches[0] == [1, 2, 3, 4]
    assert batches[1] == [5]  # the next is far shorter
    assert score._batches([], 4) == []


def test_continuations_equal_the_plain_path_and_know_what_greedy_would_say(loaded, monkeypatch):
    """Contexts that begin alike and others, continuations of one and of many tokens, one context twice."""
    monkeypatch.setattr(score, "LONG", 20)
    rng = np.random.default_rng(5)
    prefix = rng.integers(0, 500, size=60).tolist()
    contexts = [prefix + [int(n)] * 3 for n in (7, 8, 9)] + [[int(n)] * 5 for n in (1, 2)] + [prefix[:40] + [3] * 30]
    requests = [(context, [int(token)]) for context in contexts for token in (4, 5)]
    requests += [
        (context, rng.integers(0, 500, size=n).tolist())
        for context, n in zip(contexts, (2, 5, 3, 9, 1, 30), strict=True)
    ]
    loaded.model.eval()
    for context in contexts[:2]:
        best = loaded.model(torch.tensor([context])).logits[0, -1].argmax().item()
        requests.append((context, [best]))
    seen = []
    answers = score.continuation_logprobs(
        loaded, requests, batch_size=3, on_progress=lambda done, total: seen.append((done, total))
    )
    expected = [plain(loaded, context, continuation) for context, continuation in requests]
    np.testing.assert_allclose([value for value, _ in answers], expected, atol=1e-4, rtol=0)
    assert [greedy for _, greedy in answers[-2:]] == [True, True]
    assert not any(greedy for _, greedy in answers[12:18])
    assert seen[-1] == (20, 20)
