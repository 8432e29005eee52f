"""On a CUDA machine (make gpu)."""

from __future__ import annotations

import pytest
import torch

from unsloth_factory.model.dequantize import BaseWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
IDS = [5, 9, 40, 77, 3, 21, 8]


def test_qlora_step_with_checkpointing(load, row):
    loaded = load(quantization_bit=4, for_training=True)
    assert loaded.causal_lm.is_gradient_checkpointing
    loaded.model.train()
    ids, positions = (tensor.to(loaded.device) for tensor in row(IDS))
    states = loaded.hidden_states(ids, positions, None)
    assert states.dtype == loaded.dtype
    loaded.lm_head(states).float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in loaded.trainable_parameters())


def test_round_trip_on_the_gpu_is_what_was_trained_on(load, random_model_dir):
    from bitsandbytes.functional import dequantize_4bit

    loaded = load(quantization_bit=4)
    base = BaseWeights(random_model_dir, loaded.quantization, loaded.device)
    for name, module in loaded.model.named_modules():
        if module.__class__.__name__ == "Linear4bit":
            held = dequantize_4bit(module.weight.data, module.weight.quant_state).cpu()
            assert torch.equal(base.tensor(f"{name}.weight"), held), name


def test_embeddings_and_head_stay_in_16_bit(load):
    loaded = load(quantization_bit=4, for_training=True)
    assert loaded.lm_head.weight.dtype == loaded.dtype
    assert loaded.causal_lm.get_input_embeddings().weight.dtype == loaded.dtype
