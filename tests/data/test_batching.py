"""Step plans are pure functions; packed documents do not see one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from unsloth_factory.data.batching import IGNORED, StepPlan, pack, pad
from unsloth_factory.data.types import TokenSample


def sample(ids: list[int], trained_from: int, source: str = "s") -> TokenSample:
    array = np.array(ids, dtype=np.int32)
    return TokenSample(array, np.arange(len(ids)) >= trained_from, source)


def test_steps_cover_every_epoch_once():
    plan = StepPlan(n_samples=10, batch_size=2, accumulation_steps=2, epochs=2, max_steps=None, seed=7)
    assert (plan.samples_per_step, plan.steps_per_epoch, plan.total_steps) == (4, 3, 6)
    epochs = [[i for k in (3 * e, 3 * e + 1, 3 * e + 2) for micro in plan.step(k) for i in micro] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert [len(micro) for micro in plan.step(0)] == [2, 2]
    assert [len(micro) for micro in plan.step(2)] == [2], "the last step of an epoch takes what is left"
    assert [plan.samples_seen(k) for k in range(5)] == [0, 4, 8, 10, 14]
    assert plan.epoch(3) == 1.0


def test_a_step_depends_on_seed_and_number_only():
    plan = StepPlan(n_samples=50, batch_size=4, accumulation_steps=2, epochs=3, max_steps=None, seed=1)
    later = StepPlan(n_samples=50, batch_size=4, accumulation_steps=2, epochs=9, max_steps=None, seed=1)
    order = [plan.step(k) for k in reversed(range(plan.total_steps))][::-1]
    assert order == [later.step(k) for k in range(plan.total_steps)]
    other = StepPlan(n_samples=50, batch_size=4, accumulation_steps=2, epochs=3, max_steps=None, seed=2)
    assert other.step(0) != plan.step(0)
    # Stored numbers: a resumed run of a later version must see the same samples.
    assert StepPlan(8, 2, 2, 1, None, 3407).step(0) == [[7, 5], [3, 0]]


def test_micro_batch_size_does_not_change_the_step():
    wide = StepPlan(n_samples=21, batch_size=8, accumulation_steps=1, epochs=1, max_steps=None, seed=5)
    narrow = StepPlan(n_samples=21, batch_size=1, accumulation_steps=8, epochs=1, max_steps=None, seed=5)
    for k in range(wide.total_steps):
        assert sum(wide.step(k), []) == sum(narrow.step(k), [])


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"), [(0.5, None, 5), (0.1, None, 1), (1.25, None, 13), (9, 4, 4)]
)
def test_total_steps(epochs, max_steps, total):
    assert StepPlan(40, 2, 2, epochs, max_steps, 0).total_steps == total


def test_pack_by_hand():
    batch = pack([sample([10, 11, 12], 1, "a"), sample([20, 21], 1, "b")])
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.attention_mask is None
    # Position 2 is the last of its document: it must not predict the next document's first token.
    assert batch.targets.tolist() == [[11, 12, IGNORED, 21, IGNORED]]
    assert (batch.trained_tokens, batch.tokens, batch.sources) == (3, 5, ("a", "b"))
    first_trained = pack([sample([10, 11], 0), sample([20, 21], 0)])
    assert first_trained.targets.tolist() == [[11, IGNORED, 21, IGNORED]]


def test_pad_by_hand():
    batch = pad([sample([10, 11, 12], 2), sample([20, 21], 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[10, 11, 12], [20, 21, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert batch.targets.tolist() == [[IGNORED, 12, IGNORED], [21, IGNORED, IGNORED]]
    assert batch.document_ids is None
    assert (batch.trained_tokens, batch.tokens) == (2, 5)
    assert {t.dtype for t in (batch.input_ids, batch.position_ids, batch.targets)} == {torch.int64}


@pytest.fixture(scope="module")
def model(random_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_model_dir, dtype=torch.float32)


def logits(model, batch) -> torch.Tensor:
    return model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_do_not_see_one_another(model, checkpointing):
    first, second = sample([5, 6, 7, 8, 9], 1), sample([15, 16, 17, 18], 1)
    changed = sample([50, 60, 70, 80, 90], 1)
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    try:
        packed = logits(model, pack([first, second])).detach()[0, 5:]
        perturbed = logits(model, pack([changed, second])).detach()[0, 5:]
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
    alone = logits(model, pack([second])).detach()[0]
    assert torch.equal(packed, perturbed)
    assert torch.allclose(packed, alone, atol=1e-6)


def test_padded_and_packed_losses_agree(model):
    samples = [sample([5, 6, 7, 8, 9], 2), sample([15, 16, 17], 1)]
    packed, padded = pack(samples), pad(samples, pad_id=0)
    with torch.no_grad():
        a = logits(model, packed)
        b = model(input_ids=padded.input_ids, attention_mask=padded.attention_mask, use_cache=False).logits

    def total(scores, targets):
        return torch.nn.functional.cross_entropy(scores.flatten(0, 1), targets.flatten(), reduction="sum")

    assert packed.trained_tokens == padded.trained_tokens == 5
    assert total(a, packed.targets).item() == pytest.approx(total(b, padded.targets).item(), rel=1e-5)
