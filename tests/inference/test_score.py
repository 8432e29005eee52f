"""Scoring: the shared start, tails in one row and the adapter's switch change no log-probability."""

from __future__ import annotations

import json
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
@pytest.mark.parametrize("at_once", [1, 4, None])
def test_equal_to_the_plain_path_with_the_adapter_on_and_off(loaded, adapter, at_once):
    prompts, choices = subject(3)
    was_training = loaded.model.training
    loaded.model.eval()
    with nullcontext() if adapter else loaded.adapter_disabled():
        expected = [[plain(loaded, p, choice) for choice in row] for p, row in zip(prompts, choices, strict=True)]
    loaded.model.train(was_training)
    with nullcontext() if adapter else loaded.adapter_disabled():
        scores = choice_logprobs(loaded, prompts, choices, at_once=at_once)
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)
    if not adapter:
        with pytest.raises(AssertionError):  # the adapter matters at all
            np.testing.assert_allclose(choice_logprobs(loaded, prompts, choices), expected, atol=1e-1, rtol=0)


class Passes:
    """The passes through the model: tokens that the cache held, new ones, and positions whose logits were made."""

    def __init__(self, monkeypatch):
        self.seen = []
        self.original = score.forward
        monkeypatch.setattr(score, "forward", self)

    def __call__(self, loaded, ids, positions, mask, cache, last):
        self.seen.append((cache.get_seq_length(), ids.shape[1], len(last)))
        return self.original(loaded, ids, positions, mask, cache, last)


def test_the_start_is_computed_once_and_nothing_is_padding(loaded, monkeypatch):
    prompts, choices = subject(4)
    passes = Passes(monkeypatch)
    choice_logprobs(loaded, prompts, [row[:1] for row in choices], at_once=4)
    tails = [len(prompt) - 90 for prompt in prompts]
    # of choices with several tokens, all but the last are behind the prompt
    tails[3] += 2
    tails[7] += 3
    assert [held for held, _, _ in passes.seen] == [0, 90, 90]
    assert [new for _, new, _ in passes.seen] == [90 + sum(tails[:4]), sum(tails[4:8]), sum(tails[8:])]
    assert [made for _, _, made in passes.seen] == [4 + 2, 4 + 3, 1]


def test_a_pass_holds_so_many_tokens_and_positions(loaded, monkeypatch):
    prompts, choices = subject(4)
    monkeypatch.setitem(score.PASS_TOKENS, "cpu", 150)
    passes = Passes(monkeypatch)
    whole = choice_logprobs(loaded, prompts, choices)
    assert all(new <= 150 for _, new, _ in passes.seen)
    assert len(passes.seen) == 4
    monkeypatch.setattr(score, "POSITIONS", 3)
    passes.seen.clear()
    np.testing.assert_allclose(choice_logprobs(loaded, prompts, choices), whole, atol=1e-5, rtol=0)
    assert all(made <= 3 for _, _, made in passes.seen if made != 4)  # one row alone wants four
    assert len(passes.seen) > 5


def test_prompts_with_nothing_in_common_share_a_pass(loaded, monkeypatch):
    rng = np.random.default_rng(8)
    prompts = [rng.integers(0, 500, size=size).tolist() for size in (50, 7, 40)]
    passes = Passes(monkeypatch)
    scores = choice_logprobs(loaded, prompts, [[[1], [2]]] * 3)
    assert passes.seen == [(0, 97, 3)]
    loaded.model.eval()
    expected = [[plain(loaded, prompt, [token]) for token in (1, 2)] for prompt in prompts]
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [60, 120])
def test_a_sliding_window_counts_the_tokens_of_a_row_alone(window, pytestconfig, tmp_path):
    """Longer than the window alone, in one row with others only as far as the window reaches over all of it."""
    root = next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "make_random_model"))
    folder = root.make_random_model(tmp_path, family="mistral")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": window}))
    sliding = load_model(ModelSettings(model=str(folder)))
    prompts, choices = subject(3, shared=90)
    expected = [[plain(sliding, p, choice) for choice in row] for p, row in zip(prompts, choices, strict=True)]
    np.testing.assert_allclose(choice_logprobs(sliding, prompts, choices), expected, atol=1e-4, rtol=0)


def test_continuations_equal_the_plain_path_and_know_what_greedy_would_say(loaded, monkeypatch):
    """Contexts that begin alike and others, continuations of one and of many tokens, one context twice."""
    monkeypatch.setattr(score, "POSITIONS", 20)
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
        loaded, requests, at_once=3, on_progress=lambda done, total: seen.append((done, total))
    )
    expected = [plain(loaded, context, continuation) for context, continuation in requests]
    np.testing.assert_allclose([value for value, _ in answers], expected, atol=1e-4, rtol=0)
    assert [greedy for _, greedy in answers[-2:]] == [True, True]
    assert not any(greedy for _, greedy in answers[12:18])
    assert seen[-1] == (20, 20)
