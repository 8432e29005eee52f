"""Optimizers: what decays, and state that survives a trip through safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unsloth_factory.training.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    # 128 x 64 is large enough for bitsandbytes to keep its state in 8 bit (4,096 values), the others are not
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((128, 64), (7,), (3, 5))]


def walk(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_state_round_trip_is_exact(kind: str, tmp_path: Path) -> None:
    straight = parameters()
    optimizer = make_optimizer(kind, straight, weight_decay=0.1)  # type: ignore[arg-type]
    walk(optimizer, straight, range(5))
    tensors, metadata = optimizer_tensors(optimizer)
    save_file(tensors, tmp_path / "o.safetensors", metadata=metadata)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in straight]
    walk(optimizer, straight, range(5, 9))

    again = make_optimizer(kind, resumed, weight_decay=0.1)  # type: ignore[arg-type]
    with safe_open(tmp_path / "o.safetensors", "pt") as file:
        load_optimizer_tensors(again, load_file(tmp_path / "o.safetensors"), file.metadata())
    walk(again, resumed, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))


def test_eight_bit_state_is_eight_bit() -> None:
    weights = parameters()
    optimizer = make_optimizer("adamw_8bit", weights, weight_decay=0.0)
    walk(optimizer, weights, range(1))
    assert optimizer.state[weights[0]]["state1"].dtype == torch.uint8


def test_only_matrices_decay() -> None:
    weights = [torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))]
    optimizer = make_optimizer("adamw", weights, weight_decay=0.5)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    assert torch.allclose(weights[0], torch.full((2, 2), 0.95))
    assert torch.equal(weights[1], torch.ones(2))
