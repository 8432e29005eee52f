"""AdamW in 32 and 8 bit, and its state as tensors that safetensors can hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import OptimizerType

BETAS = (0.9, 0.999)
EPSILON = 1e-8


def make_optimizer(
    kind: OptimizerType, parameters: list[torch.nn.Parameter], *, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101); weight decay on matrices only.

    The learning rate starts at 0: the loop sets it before each step.

    Raises:
        UserError: An 8-bit optimizer without bitsandbytes.
    """
    groups = _groups(parameters, weight_decay)
    if kind == "adamw":
        # fused: one kernel for all tensors on a GPU; results do not depend on the order of anything
        fused = all(p.device.type == "cuda" for p in parameters)
        return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON, fused=fused)
    try:
        from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit
    except ImportError as error:
        raise UserError(f"--optimizer {kind} needs bitsandbytes: pip install bitsandbytes, or use adamw") from error
    # Pages move between GPU and CPU memory; on a CPU there is nothing to move, and the plain one is the same.
    paged = kind == "paged_adamw_8bit" and parameters[0].device.type == "cuda"
    return (PagedAdamW8bit if paged else AdamW8bit)(groups, lr=0.0, betas=BETAS, eps=EPSILON)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that the first step would make, all zeros; what is there already stays.

    Done before the first step, it shows whether the memory suffices, and no step fails for want of it half-way.
    """
    for number, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if optimizer.state[parameter]:
                continue
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                optimizer.init_state(group, parameter, number, position)
                continue
            home = parameter.device if group["fused"] else torch.device("cpu")
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=home),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            }


def _groups(parameters: list[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The optimizer's state as named CPU tensors, and what is not a tensor as safetensors metadata.

    Names are paths: "<parameter index>/<key>/...". bitsandbytes nests its state one level deeper than torch, so the
    walk is recursive. Each tensor is a copy: bitsandbytes shares one quantisation map among all parameters, which
    safetensors refuses.
    """
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for path, value in _leaves(optimizer.state_dict()["state"]):
        if isinstance(value, torch.Tensor):
            tensors[path] = value.detach().to("cpu", copy=True).contiguous()
        else:
            scalars[path] = value
    return tensors, {"scalars": json.dumps(scalars)}


def _leaves(tree: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}/")
        else:
            yield path, value


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Put back what `optimizer_tensors` took; parameter groups keep their present settings."""
    state: dict[Any, Any] = {}
    for path, value in [*tensors.items(), *json.loads(metadata["scalars"]).items()]:
        index, *keys = path.split("/")
        branch = state.setdefault(int(index), {})
        for key in keys[:-1]:
            branch = branch.setdefault(key, {})
        branch[keys[-1]] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    _restore_pages(optimizer)


def _restore_pages(optimizer: torch.optim.Optimizer) -> None:
    """Move loaded moments back into pageable memory: bitsandbytes loads them as ordinary GPU tensors."""
    if not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for key in ("state1", "state2"):
            loaded = state[key]
            page = optimizer.get_state_buffer(parameter, dtype=loaded.dtype)  # type: ignore[attr-defined]
            page.copy_(loaded)
            state[key] = page


def state_bytes(kind: OptimizerType, parameters: list[torch.nn.Parameter]) -> int:
    """Size of the optimizer's state on disk, bytes: two moments a parameter."""
    width = 4 if kind == "adamw" else 1
    return 2 * width * sum(p.numel() for p in parameters)
