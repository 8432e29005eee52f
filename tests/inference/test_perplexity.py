"""Losses of given answers: equal to transformers' own, whatever is computed together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.inference import perplexity
from unsloth_factory.inference.perplexity import answer_losses
from unsloth_factory.model.load import load_model

ROWS = [
    ("你好", "你好。"),
    ("高血压患者平时注意什么？", "应低盐饮食，按时服药，并定期测量血压。"),
    ("What should one avoid?", "Sugar."),
]


@pytest.fixture(scope="module")
def loaded(random_model_dir):
    """A model with an adapter that changes it."""
    loaded = load_model(
        ModelSettings(model=str(random_model_dir)), for_training=True, tuning=TuningSettings(lora_r=4), seed=1
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return loaded


@pytest.fixture(scope="module")
def samples(loaded):
    template = ChatTemplate.from_tokenizer(loaded.tokenizer)
    return [template.encode_answer((Turn("user", q), Turn("assistant", a)), "x") for q, a in ROWS]


def by_transformers(loaded, sample) -> float:
    labels = np.where(sample.trained, sample.ids, -100).astype(np.int64)
    loaded.model.eval()
    with torch.no_grad():
        output = loaded.model(
            torch.from_numpy(sample.ids.astype(np.int64))[None], labels=torch.from_numpy(labels)[None]
        )
    return float(output.loss)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_equal_to_transformers_loss_for_base_and_tuned(loaded, samples, batch_size):
    seen = []
    tuned = answer_losses(loaded, samples, batch_size=batch_size, on_progress=lambda *p: seen.append(p))
    assert [loss.tokens for loss in tuned] == [int(sample.trained.sum()) for sample in samples]
    assert [loss.total / loss.tokens for loss in tuned] == pytest.approx(
        [by_transformers(loaded, sample) for sample in samples], abs=1e-5
    )
    with loaded.adapter_disabled():
        base = answer_losses(loaded, samples, batch_size=batch_size)
        expected = [by_transformers(loaded, sample) for sample in samples]
    assert [loss.total / loss.tokens for loss in base] == pytest.approx(expected, abs=1e-5)
    assert base != tuned
    assert seen[-1] == (3, 3)


def test_the_logits_are_made_in_pieces(loaded, samples, monkeypatch):
    whole = answer_losses(loaded, samples)
    monkeypatch.setattr(loaded, "logit_bytes", 4 * loaded.vocabulary * 5)
    assert [loss.total for loss in answer_losses(loaded, samples)] == pytest.approx([loss.total for loss in whole])


def test_only_the_answer_counts_and_the_mode_stays(loaded, samples):
    loaded.model.train()
    first = answer_losses(loaded, samples[:1])[0]
    assert loaded.model.training
    assert first.tokens < len(samples[0].ids) / 2
    assert answer_losses(loaded, []) == []


def test_batches_of_like_length_hold_only_so_many_tokens():
    assert perplexity._batches([10, 3, 9, 5], 4, 20) == [[0, 2], [3, 1]]
    assert perplexity._batches([50, 3], 4, 20) == [[0], [1]]
