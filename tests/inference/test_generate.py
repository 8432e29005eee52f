"""Batched generation against one prompt at a time, sampling against its distribution, choices against full logits."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.generate import generate, length_batches, stream_tokens
from unsloth_factory.inference.sampling import Sampling, choose, row_streams
from unsloth_factory.inference.score import choice_logprobs
from unsloth_factory.model.loaded import LoadedModel


@pytest.fixture(scope="module")
def loaded(random_model_dir) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(random_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(random_model_dir)
    device = torch.device("cpu")
    return LoadedModel(model, tokenizer, random_model_dir, "standard", "", device, torch.float32, False, "")


def random_prompts(loaded: LoadedModel, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, len(loaded.tokenizer) - 10, size=n).tolist() for n in lengths]


def test_batched_greedy_equals_one_at_a_time_in_the_order_of_the_prompts(loaded):
    prompts = random_prompts(loaded, [3, 40, 1, 17, 25, 8, 9])
    alone = [generate(loaded, [p], stop_ids=(), max_new_tokens=24)[0] for p in prompts]
    stop = alone[0].ids[5]  # something that the model does say, so that rows end at different times
    alone = [generate(loaded, [p], stop_ids=(stop,), max_new_tokens=24)[0] for p in prompts]
    seen = []
    together = generate(
        loaded,
        prompts,
        stop_ids=(stop,),
        max_new_tokens=24,
        batch_size=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert together == alone
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert together[0].stopped
    assert stop not in together[0].ids
    assert any(not answer.stopped and len(answer.ids) == 24 for answer in together)


def test_greedy_equals_the_argmax_of_a_full_forward(loaded):
    prompt = random_prompts(loaded, [12])[0]
    answer = generate(loaded, [prompt], stop_ids=(), max_new_tokens=6)[0].ids
    with torch.no_grad():
        logits = loaded.model(torch.tensor([prompt + answer])).logits[0]
    assert answer == logits[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert list(stream_tokens(loaded, prompt, stop_ids=(), max_new_tokens=6)) == answer


def test_sampling_is_seeded_by_row_and_free_of_warnings(loaded):
    prompts = random_prompts(loaded, [5, 9, 14])
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=20, seed=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = generate(loaded, prompts, stop_ids=(), max_new_tokens=8, sampling=sampling, batch_size=3)
        generate(loaded, prompts[:1], stop_ids=(), max_new_tokens=2)
    assert first == generate(loaded, prompts, stop_ids=(), max_new_tokens=8, sampling=sampling, batch_size=1)
    other = generate(loaded, prompts, stop_ids=(), max_new_tokens=8, sampling=Sampling(temperature=1.0, seed=8))
    assert first != other


def test_draws_follow_the_distribution_cut_by_top_k_and_top_p():
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().repeat(4000, 1)

    def shares(**settings):
        sampling = Sampling(temperature=1.0, **settings)
        drawn = choose(logits, sampling, row_streams(sampling, range(4000)))
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(), probabilities, atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 0.625, 0, 0.375], atol=0.03)
    # 0.5 + 0.3 reach 0.8, so that the third is out; at 0.81 it is in.
    np.testing.assert_allclose(shares(top_p=0.79), [0, 0.625, 0, 0.375], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.81), [0, 0.526, 0.158, 0.316], atol=0.03)


def test_a_prompt_that_fills_the_context_is_refused(loaded):
    full = random_prompts(loaded, [loaded.max_positions])[0]
    with pytest.raises(UserError, match=r"1024 tokens fills the model's context of 1024"):
        generate(loaded, [full], stop_ids=(), max_new_tokens=4)
    assert len(generate(loaded, [full[2:]], stop_ids=(), max_new_tokens=4)[0].ids) == 2


def test_dropout_is_off_and_the_mode_comes_back(loaded):
    loaded.model.train()
    try:
        generate(loaded, [[1, 2, 3]], stop_ids=(), max_new_tokens=1)
        assert loaded.model.training
    finally:
        loaded.model.eval()


def test_batches_hold_like_lengths_longest_first():
    assert length_batches([3, 9, 1, 7], 2) == [[1, 3], [0, 2]]


def reference_logprobs(loaded, prompt, choices):
    scores = []
    for choice in choices:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[len(prompt) - 1 + k, token]) for k, token in enumerate(choice)))
    return scores


@pytest.mark.parametrize("shared", [0, 50])
def test_choices_equal_the_full_forward_with_and_without_a_shared_prefix(loaded, shared):
    prefix = random_prompts(loaded, [shared])[0]
    prompts = [prefix + tail for tail in random_prompts(loaded, [4, 30, 11, 2, 19])]
    choices = [[[10], [20], [30]] for _ in prompts]
    choices[1] = [[10, 11], [10, 12, 13], [30]]  # several tokens, a shared first token
    seen = []
    scores = choice_logprobs(loaded, prompts, choices, at_once=2, on_progress=lambda *p: seen.append(p))
    expected = [reference_logprobs(loaded, p, c) for p, c in zip(prompts, choices, strict=True)]
    np.testing.assert_allclose(scores, expected, atol=2e-5)
    assert seen[-1] == (5, 5)


def test_identical_prompts_and_no_prompts(loaded):
    prompt = random_prompts(loaded, [60])[0]
    scores = choice_logprobs(loaded, [prompt, prompt], [[[1], [2]]] * 2)
    np.testing.assert_allclose(scores[0], reference_logprobs(loaded, prompt, [[1], [2]]), atol=2e-5)
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-6)
    assert choice_logprobs(loaded, [], []).shape == (0, 0)


def test_only_the_last_position_goes_through_the_head(loaded, monkeypatch):
    widths = []
    head = loaded.model.lm_head
    original = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: (widths.append(hidden.shape[1]), original(hidden))[1])
    choice_logprobs(loaded, random_prompts(loaded, [60, 70]), [[[1], [2]]] * 2)
    assert widths == [2]  # of 130: the last of each prompt


def test_rows_that_are_done_leave_the_batch_without_disturbing_the_others(loaded):
    prompts = random_prompts(loaded, [5, 9, 14, 3, 7, 11])
    sampling = Sampling(temperature=1.5, seed=2)
    stops = range(0, len(loaded.tokenizer), 8)  # one token in eight ends an answer

    def answers(batch_size):
        return generate(loaded, prompts, stop_ids=stops, max_new_tokens=30, sampling=sampling, batch_size=batch_size)

    together = answers(6)
    assert len({len(answer.ids) for answer in together}) >= 4
    assert together == answers(1)
