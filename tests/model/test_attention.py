"""Grouped attention on a CPU: transformers' results, training left alone."""

from __future__ import annotations

import json

import pytest
import torch
from transformers.integrations import sdpa_attention

from unsloth_factory.model.attention import GROUPED, attention_for

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def steps(loaded, mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a batch that is padded on the left, and of one more token behind its cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=loaded.causal_lm.config)
    ids = torch.arange(mask.numel()).view(mask.shape) % 50
    first = loaded.model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    longer = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return [first, loaded.model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=cache).logits]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_are_those_of_transformers(family, family_dir, load, monkeypatch):
    loaded = load(family_dir(family))
    config = loaded.causal_lm.config
    assert config._attn_implementation == GROUPED
    assert config.num_key_value_heads < config.num_attention_heads, "nothing is grouped: the test would show nothing"
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :7] = 0
    with torch.inference_mode():
        loaded.causal_lm.set_attn_implementation("sdpa")
        expected = steps(loaded, mask)
        loaded.causal_lm.set_attn_implementation(GROUPED)
        monkeypatch.setattr(sdpa_attention, "repeat_kv", pytest.fail)  # what it is there to avoid
        for ours, theirs in zip(steps(loaded, mask), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # with 5.17.0 not a bit differs


def test_training_keeps_to_the_function_of_transformers(load, monkeypatch):
    calls = []
    theirs = sdpa_attention.sdpa_attention_forward
    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", lambda *a, **k: calls.append(1) or theirs(*a, **k))
    loaded = load()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    loaded.model(input_ids=torch.ones(2, 9, dtype=torch.long), attention_mask=mask)
    assert len(calls) == loaded.causal_lm.config.num_hidden_layers


def test_a_gpu_takes_that_of_transformers_and_no_saved_model_names_ours(load, tmp_path):
    assert attention_for(torch.device("cuda")) == "sdpa"
    load().causal_lm.config.save_pretrained(tmp_path)
    assert GROUPED not in json.dumps(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
