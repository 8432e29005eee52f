"""The fast engine computes what the standard one computes: hidden states, gradients of every LoRA matrix, answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.rotary import Heads
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.embedding import HostEmbedding
from unsloth_factory.model.fast.graphs import Bucket
from unsloth_factory.model.fast.layer import Row, Saving
from unsloth_factory.model.fast.load import FolderWeights, load_fast
from unsloth_factory.model.fast.planner import divide, saved_numbers
from unsloth_factory.model.fast.spec import DecoderSpec, why_not
from unsloth_factory.model.lora import attach_lora

sys.path.insert(0, str(Path(__file__).resolve().parent))
from fast_models import CPU, TUNING, both, packed_inputs, run, same  # noqa: E402


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_gradients_of_packed_rows(family_dir, family):
    standard, fast = both(family_dir(family))
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


@pytest.mark.parametrize("saving", list(Saving))
def test_gradients_are_bit_equal_whatever_is_kept(random_model_dir, saving):
    _, fast = both(random_model_dir)
    kept = run(fast, packed_inputs())
    fast.get_base_model().model.planner.forced = saving
    again = run(fast, packed_inputs())
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize(
    "plan", [[Saving.KEEP] * 2, [Saving.RECOMPUTE, Saving.KEEP], [Saving.DROP_GATE_UP] * 2, [Saving.RECOMPUTE] * 2]
)
def test_what_is_kept_lies_in_the_arena(random_model_dir, plan):
    """The same bits as without it, in the room that the planner counts."""
    _, fast = both(random_model_dir)
    decoder = fast.get_base_model().model
    inputs = packed_inputs()
    decoder.planner.forced = plan
    plain = run(fast, inputs)
    row = Row(
        *decoder.table.of(inputs["position_ids"][0]),
        Documents.of([7, 1, 12], CPU),
        Arena(4 * (20 * planned(decoder, plan) + 64 * 20), torch.float32, CPU),
    )
    hidden_weights = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))[0]
    for _ in range(2):  # the second micro-batch takes the room of the first
        fast.zero_grad()
        with torch.no_grad():
            last, saved = decoder.forward_stack(decoder.embed_tokens(inputs["input_ids"][0]), row, plan)
            hidden = decoder.final_norm(last)
            decoder.adapter.prepare()
            decoder.backward_stack(hidden_weights, last, saved, row)
        assert row.arena.outside == 0
        assert torch.equal(hidden, plain[0][0])
        assert all(torch.equal(p.grad, plain[1][name]) for name, p in fast.named_parameters() if p.requires_grad)


def planned(decoder: Any, plan: list[Saving]) -> int:
    """Numbers a token that the planner expects in the arena; log-sum-exps and copies of t lie elsewhere."""
    return sum(saved_numbers(decoder.spec, saving, decoder.planner.extra) for saving in plan)


def test_low_memory(family_dir):
    """The embedding elsewhere, every layer recomputed: the same bits."""
    from transformers import AutoConfig

    folder = family_dir("llama")
    config = AutoConfig.from_pretrained(folder)
    assert not config.tie_word_embeddings
    found = []
    for low_memory in (False, True):
        weights = FolderWeights(folder, CPU, torch.float32)
        model = load_fast(weights, config, quantized=True, host_embedding=low_memory, recompute=low_memory)
        model = attach_lora(model, TUNING, 7)
        decoder = model.get_base_model().model
        decoder.bind()
        found.append(run(model.train(), packed_inputs()))
    assert isinstance(decoder.embed_tokens, HostEmbedding)
    assert decoder.planner.plan(20) == [Saving.RECOMPUTE] * 2
    assert decoder.planner.room(20) < 2 * 20 * 2 * 64 * 2 + 2**18
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert decoder.embed_tokens.to(torch.float16).weight.dtype == torch.float32  # it stays as and where it is


def test_rows_gathered_ahead_are_the_same_rows(monkeypatch):
    embedding = HostEmbedding(torch.randn(50, 8), CPU)
    first, second = torch.tensor([3, 7, 7, 49]), torch.tensor([0, 7, 7, 49])
    gathered = []
    gather = HostEmbedding._gathered
    monkeypatch.setattr(HostEmbedding, "_gathered", lambda self, ids: gathered.append(ids) or gather(self, ids))
    embedding.expect(first)
    assert torch.equal(embedding(first.view(2, 2)), embedding.weight[first.view(2, 2)])
    assert len(gathered) == 1
    embedding.expect(first)  # and others come: those of an evaluation, or of a step that is done again
    assert torch.equal(embedding(second), embedding.weight[second])
    assert torch.equal(embedding(first), embedding.weight[first])
    assert len(gathered) == 4


def test_the_planner_spends_what_there_is():
    spec = DecoderSpec("qwen3", 36, 4096, 12288, Heads(32, 8, 128), 151936, 1e-6, True, (False, False), False)
    gib = 2**30
    kept = [divide(spec, 2048, budget * gib, 2, 192).count(Saving.KEEP) for budget in (1, 2, 4, 6, 8)]
    assert kept == sorted(kept)
    assert kept[0] == 1
    assert kept[-1] == 36
    for budget in (2, 3, 4, 5, 6):
        plan = divide(spec, 2048, budget * gib, 2, 192)
        spent = sum(saved_numbers(spec, saving, 192) for saving in plan) * 2048 * 2
        assert 0.9 * budget * gib <= spent <= budget * gib
        assert plan[-1] is Saving.KEEP


def test_nf4(random_model_dir):
    standard, fast = both(random_model_dir, bits=4)
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


def test_padded_rows(random_model_dir):
    standard, fast = both(random_model_dir)
    ids = packed_inputs()["input_ids"].reshape(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "position_ids": torch.arange(10).expand(2, 10), "attention_mask": mask}
    same(run(fast, inputs), run(standard, inputs))


def test_some_targets_only(random_model_dir):
    tuning = TuningSettings(lora_r=4, lora_target="k_proj,up_proj,down_proj")
    standard, fast = both(random_model_dir, tuning=tuning)
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


def test_new_adapters_start_alike(random_model_dir):
    standard, fast = both(random_model_dir)
    ours, theirs = dict(fast.named_parameters()), dict(standard.named_parameters())
    trained = [name for name, p in theirs.items() if p.requires_grad]
    assert trained == [name for name, p in ours.items() if p.requires_grad]
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)


def test_a_switched_off_adapter(random_model_dir):
    standard, fast = both(random_model_dir)
    outputs = []
    for model in (standard, fast):
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            outputs.append(model.get_base_model().model(**packed_inputs(), use_cache=False).last_hidden_state)
    assert torch.allclose(*outputs, atol=1e-5)


def test_generation_with_a_cache(random_model_dir):
    from transformers import DynamicCache

    standard, fast = both(random_model_dir)
    ids = packed_inputs()["input_ids"].reshape(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    outputs = []
    for model in (standard.eval(), fast.eval()):
        inner, cache = model.get_base_model(), DynamicCache(config=model.get_base_model().config)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            first = inner(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, logits_to_keep=1
            ).logits
            longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            second = inner(
                input_ids=ids[:, :1], position_ids=mask.sum(1, keepdim=True), attention_mask=longer,
                past_key_values=cache, logits_to_keep=1,
            ).logits  # fmt: skip
        outputs.append(torch.cat([first, second]))
    assert torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("chunk", [10**9, 4000])
def test_cross_entropy_of_the_head(chunk):
    from unsloth_factory.model.fast import head

    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(300, 16)
    targets = torch.randint(0, 300, (9,))
    (head.cross_entropy_sum(hidden, weight, targets, chunk) * 0.5).backward()
    again = hidden.detach().clone().requires_grad_()
    (torch.nn.functional.cross_entropy(again @ weight.t(), targets, reduction="sum") * 0.5).backward()
    assert torch.allclose(hidden.grad, again.grad, atol=1e-6)


def test_what_it_cannot_run_is_named():
    from transformers import AutoConfig

    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, head_dim=24)
    assert why_not(config) is None
    assert why_not(config, quantized=True) == "4-bit rows of 96, 192, 96 weights (multiples of 64 are needed)"
    assert why_not(AutoConfig.for_model("llama", **sizes, mlp_bias=True)) == "biases in the MLP"
    assert "model type gpt2" in str(why_not(AutoConfig.for_model("gpt2")))
    window = AutoConfig.for_model("mistral", **sizes, sliding_window=4096)
    assert "window of 4096 tokens" in str(why_not(window))


def test_rows_that_share_a_graph() -> None:
    """With attention that launches by tokens, rows of as many tokens do; else the longest document counts as well."""
    assert Bucket.of((300, 200)) == Bucket(512, 4, 512)
    assert Bucket.of((512,)) == Bucket(512, 2, 512)  # the second place is for padding
    assert Bucket.of((900, 600)) == Bucket(1536, 4, 1024)
    assert Bucket.of((1500,)) == Bucket(1536, 2, 1536)
    rows = [(900, 600), (1500,), (300,) * 5, (20, 1500)]
    assert len({Bucket.of(lengths) for lengths in rows}) == 4
    assert {Bucket.of(lengths, by_tokens=True) for lengths in rows} == {Bucket(1536, 8, 1536)}
    assert Bucket.of((100,) * 12, by_tokens=True) == Bucket(1280, 16, 1280)
