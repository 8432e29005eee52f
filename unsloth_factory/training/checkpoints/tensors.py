"""What a checkpoint holds in tensors: trained weights, optimizer state, random state. safetensors only, no pickle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.memory.shortage import is_shortage
from unsloth_factory.training.optimizers import load_optimizer_tensors, optimizer_tensors

ADAPTER = "adapter"
WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"
RANDOM = "rng.safetensors"


def trained(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of everything that trains."""
    return {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}


def require_finite(loaded: LoadedModel, what: str) -> None:
    """Refuse to write weights that hold NaN or infinity.

    Raises:
        UserError: Names the first such tensor.
    """
    named = trained(loaded)
    bad = [name for name, finite in zip(named, _finite(list(named.values())), strict=True) if not finite]
    if bad:
        raise UserError(
            f"{what} is not written: {len(bad)} of {len(named)} trained tensors hold NaN or infinity "
            f"(first: {bad[0]}). Train again with a lower --learning_rate."
        )


def _finite(parameters: list[torch.nn.Parameter]) -> list[bool]:
    try:
        # one flag a tensor, gathered on the device: a single wait instead of one for each of some hundred tensors
        return torch.stack([torch.isfinite(p.detach()).all() for p in parameters]).tolist()
    except RuntimeError as error:
        if not is_shortage(error):
            raise
    # Saving is what is left to do on a card that has become full: it must not need a byte there.
    return [bool(np.isfinite(p.detach().cpu().numpy()).all()) for p in parameters]


def write_tensors(folder: Path, loaded: LoadedModel, optimizer: torch.optim.Optimizer) -> None:
    """Write weights, optimizer state and random state into a folder.

    An adapter is stored as peft stores it, so that every checkpoint can be used as --adapter.
    """
    require_finite(loaded, folder.name)
    if loaded.has_adapter:
        loaded.save_adapter(folder / ADAPTER)
    else:
        save_file({name: p.detach().cpu().contiguous() for name, p in trained(loaded).items()}, folder / WEIGHTS)
    if loaded.device.type == "cuda":
        torch.cuda.synchronize()  # pageable optimizer state is read by the CPU
    tensors, metadata = optimizer_tensors(optimizer)
    save_file(tensors, folder / OPTIMIZER, metadata=metadata)
    save_file(_random_state(), folder / RANDOM)


def read_tensors(folder: Path, loaded: LoadedModel, optimizer: torch.optim.Optimizer) -> None:
    """Put back what `write_tensors` wrote, bit for bit."""
    read_weights(folder, loaded)
    with safe_open(folder / OPTIMIZER, "pt") as file:
        metadata = file.metadata()
    load_optimizer_tensors(optimizer, load_file(folder / OPTIMIZER), metadata)
    _restore_random_state(load_file(folder / RANDOM))


def read_weights(folder: Path, loaded: LoadedModel) -> None:
    """Put back the trained weights of a checkpoint alone."""
    path = folder / ADAPTER / "adapter_model.safetensors" if loaded.has_adapter else folder / WEIGHTS
    values = load_file(path)
    with torch.no_grad():
        for name, parameter in trained(loaded).items():
            value = values[_stored_name(name) if loaded.has_adapter else name]
            assert value.dtype == parameter.dtype, f"{name}: {value.dtype} stored, {parameter.dtype} in use"
            parameter.copy_(value)


def _stored_name(name: str) -> str:
    # peft names the adapter in the model ("lora_A.default.weight") and leaves the name out in files
    return name.replace(".default.", ".")


def _random_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _restore_random_state(states: dict[str, torch.Tensor]) -> None:
    # Every step seeds itself from (seed, step), so this only matters to code outside the step.
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name != "cpu" and int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, torch.device(name))
