"""The pre-training loop: packed rows, document-correct attention, AdamW, cosine; writes fp16 safetensors."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bundled_model.corpus import Rows

WARMUP_STEPS = 100
FINAL_RATE = 0.02
"""Learning rate at the end as a share of the peak."""
SAVE_EVERY = 400


def new_model(folder: Path) -> torch.nn.Module:
    """A Qwen3 with fresh fp32 weights from the folder's config.json."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config.dtype = torch.float32
    model = Qwen3ForCausalLM(config).float()
    depth = math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():  # residual branches start small (GPT-2)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= depth
            layer.mlp.down_proj.weight /= depth
    return model


def save_weights(model: torch.nn.Module, folder: Path) -> None:
    """Write model.safetensors in fp16 (without the tied head); a reader never sees half a file."""
    from safetensors.torch import save_file

    state = {
        name: tensor.detach().to("cpu", torch.float16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    assert all(bool(tensor.isfinite().all()) for tensor in state.values()), "a weight does not fit fp16"
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".model.safetensors.partial"
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)


def document_mask(positions: Tensor) -> Tensor:
    """[B, T] positions that restart with each document -> boolean [B, 1, T, T]: same document and not later."""
    documents = (positions == 0).cumsum(-1)
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & torch.ones(positions.shape[1], positions.shape[1], dtype=torch.bool, device=positions.device).tril()


def weighted_loss(model: torch.nn.Module, ids: Tensor, positions: Tensor, weights: Tensor) -> Tensor:
    """Mean cross entropy over the tokens, weighted; a document's first token is no target. All arguments [B, T]."""
    ids, positions = ids.long(), positions.long()
    output = model(input_ids=ids, position_ids=positions, attention_mask=document_mask(positions), use_cache=False)
    targets = ids[:, 1:].reshape(-1)
    weight = (weights[:, 1:].float() * (positions[:, 1:] > 0)).reshape(-1)
    logits = output.logits[:, :-1].reshape(len(targets), -1).float()
    losses = functional.cross_entropy(logits, targets, reduction="none")
    return (losses * weight).sum() / weight.sum()


def _optimizer(model: torch.nn.Module, rate: float, fused: bool) -> torch.optim.AdamW:
    decayed = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    plain = [p for name, p in model.named_parameters() if p.dim() < 2 or "embed" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=fused)


def _rate(progress: float, step: int) -> float:
    cosine = FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return min(1.0, (step + 1) / WARMUP_STEPS) * cosine


def pretrain(rows: Rows, args: argparse.Namespace) -> None:
    """Train for `args.steps` or until `args.max_seconds`, whichever ends first (the schedule follows the nearer)."""
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model = new_model(Path(__file__).resolve().parents[2] / "unsloth_factory" / "assets" / "tiny_model").to(device)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,} on {device}", flush=True)
    data = [torch.from_numpy(array).to(device) for array in (rows.ids, rows.positions, rows.weights)]
    optimizer = _optimizer(model, args.learning_rate, fused=device.type == "cuda")
    order, started, shown, total = np.random.default_rng(args.seed), time.time(), 0.0, None
    queue: list[int] = []
    step, progress = 0, 0.0
    while progress < 1.0:
        if len(queue) < args.batch_rows:
            queue += order.permutation(len(rows.ids)).tolist()
        picked, queue = torch.tensor(queue[: args.batch_rows], device=device), queue[args.batch_rows :]
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * _rate(progress, step)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" or args.bf16):
            loss = weighted_loss(model, *(tensor[picked] for tensor in data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total = loss.detach() if total is None else 0.95 * total + 0.05 * loss.detach()
        step += 1
        if step % 20 == 0:  # the clock is read after a synchronisation, else it runs ahead of the device
            value, seconds = float(total), time.time() - started
            progress = max(step / args.steps, seconds / args.max_seconds)
            assert math.isfinite(value), f"loss {value} at step {step}: lower --learning_rate"
            if seconds - shown > 5:
                speed = step * picked.numel() * rows.ids.shape[1] / seconds
                print(f"step {step} {progress:.0%} loss {value:.4f} {speed / 1e3:.1f} k tokens/s", flush=True)
                shown = seconds
        if step % SAVE_EVERY == 0:
            save_weights(model, args.output)
    save_weights(model, args.output)
    print(f"pre-trained: {step} steps, {time.time() - started:.0f} s, loss {float(total):.4f}", flush=True)
    if device.type == "cuda":
        print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
