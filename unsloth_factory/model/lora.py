"""LoRA on a loaded base: new matrices, or those of an adapter folder (Hu et al. 2021, arXiv 2106.09685).

The layers are peft's. A and B are float32 on every device: an update of 2e-4 * gradient would vanish in 16 bit.
"""

from __future__ import annotations

import difflib
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from unsloth_factory.model.finite import refuse_nonfinite
from unsloth_factory.model.weight_files import read_header, read_json

# Initialisations that subtract something from the base weights when the layer is made: the adapter alone is not the
# difference to the base, so that it can be neither switched off nor merged into the original weights.
BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def linear_module_names(model: Any) -> list[str]:
    """Full names of the linear layers but the output head, in the model's order."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def target_modules(model: nn.Module, lora_target: str) -> list[str]:
    """Last name parts of the layers that get LoRA matrices, sorted.

    Args:
        model: Causal language model without LoRA.
        lora_target: "all", or names by commas, such as "q_proj,v_proj".

    Raises:
        UserError: A name that no linear layer of the model has.
    """
    known = sorted({name.rsplit(".", 1)[-1] for name in linear_module_names(model)})
    if lora_target.strip() in ("all", "all-linear"):
        return known
    wanted = sorted({name.strip() for name in lora_target.split(",") if name.strip()})
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UserError(
                f"--lora_target {name}: no linear layer has that name.{hint} Known: all, {', '.join(known)}."
            )
    if not wanted:
        raise UserError(f"--lora_target is empty. Give all, or some of: {', '.join(known)}.")
    return wanted


def _random_state_kept(model: nn.Module) -> AbstractContextManager[None]:
    """Within it random numbers may be drawn; afterwards the generators of the CPU and the model's GPU are as before."""
    device = next(model.parameters()).device
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def attach_lora(model: nn.Module, tuning: TuningSettings, seed: int) -> Any:
    """Put new LoRA layers on a base; B is 0, so that the model answers as before; A is drawn from `seed` alone.

    The caller's random state is left as it was.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=tuning.lora_r,
        # Other programs expect an integer where it is one.
        lora_alpha=int(alpha) if (alpha := float(tuning.lora_alpha)).is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=tuning.lora_dropout,
        target_modules=target_modules(model, tuning.lora_target),
        task_type="CAUSAL_LM",
    )
    with _random_state_kept(model):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def load_adapter(model: nn.Module, adapter: Path, *, trainable: bool) -> Any:
    """Put the LoRA layers of a (checked) adapter folder on its base, in float32.

    Raises:
        UserError: Non-finite weights, an initialisation that changes the base, or tensors that do not fit the model.
    """
    from peft import LoraConfig, PeftModel

    refuse_nonfinite([adapter / ADAPTER_WEIGHTS])
    init = read_json(adapter / ADAPTER_CONFIG).get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise UserError(
            f"{adapter / ADAPTER_CONFIG}: init_lora_weights is {init}, which changes the base weights as well. Convert "
            "the adapter to plain LoRA first (peft: save_pretrained(path_initial_model_for_weight_conversion=...))."
        )
    config = LoraConfig.from_pretrained(str(adapter))
    try:
        with _random_state_kept(model), warnings.catch_warnings():
            # Reported below as an error, with the names.
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            peft_model = PeftModel.from_pretrained(model, str(adapter), config=config, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(f"--adapter {adapter} does not fit the model: {reason[-1] if reason else error}") from error
    _check_all_loaded(peft_model, adapter)
    return peft_model


def _check_all_loaded(peft_model: Any, adapter: Path) -> None:
    stored = {entry.name for entry in read_header(adapter / ADAPTER_WEIGHTS)}
    expected = set(adapter_state(peft_model))
    odd = sorted(stored ^ expected)
    if odd:
        where = "is missing in the file" if odd[0] in expected else "has no place in the model"
        raise UserError(f"--adapter {adapter} does not fit its adapter_config.json: {odd[0]} {where}.")


def adapter_state(peft_model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's names, on the CPU, contiguous and detached, sorted by name."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    return {name: state[name].detach().to("cpu").contiguous() for name in sorted(state)}
