"""Run a model of any size in float32 with one weight matrix in memory at a time.

transformers' own modules compute everything; only where their weights come from is replaced, on this one model object:
before a module runs its weights are read, afterwards they are dropped. With an adapter it is peft's own forward that
adds the LoRA terms, so that a merge is compared with an independent computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsloth_factory.model.foreign_code import load_config

ReadWeight = Callable[[str], torch.Tensor]
"""Base tensor name -> values. Raises KeyError for a name that is not stored."""
TOKENS_TOGETHER = 1024  # bounds the logits: 1024 positions of a 152k vocabulary are 620 MB in float32


class StreamedModel:
    """A causal language model whose weights stay on the disk. B rows, T tokens, h hidden size, V vocabulary."""

    def __init__(self, folder: Path, read_weight: ReadWeight, adapter: Path | None = None) -> None:
        """Build the model without weights.

        Args:
            folder: Its config.json is used.
            read_weight: Gives the base weights.
            adapter: PEFT adapter to apply, in float32.
        """
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM

        config = load_config(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the values come dequantised
        with init_empty_weights(include_buffers=False):
            self.base = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        _placeholders(self.base)
        self._tied = bool(getattr(config, "tie_word_embeddings", False))
        self._read_weight = read_weight
        names = {id(module): name for name, module in self.base.named_modules()}
        self.model: Any = self.base
        if adapter is not None:
            self.model = _with_adapter(self.base, adapter)
        self.model.eval()
        for module in self.model.modules():
            if id(module) in names and next(module.parameters(recurse=False), None) is not None:
                self._attach(module, names[id(module)])

    def _attach(self, module: torch.nn.Module, name: str) -> None:
        """Read the module's weights before it runs, drop them after."""
        empty = dict(module.named_parameters(recurse=False))

        def load(*_: object) -> None:
            for key in empty:
                value = self._weight(f"{name}.{key}").float()
                setattr(module, key, torch.nn.Parameter(value, requires_grad=False))

        def drop(*_: object) -> None:
            for key, parameter in empty.items():
                setattr(module, key, parameter)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)

    def _weight(self, name: str) -> torch.Tensor:
        try:
            return self._read_weight(name)
        except KeyError:
            output = self.base.get_output_embeddings()
            if not self._tied or self.base.get_submodule(name.rpartition(".")[0]) is not output:
                raise
        inputs = self.base.get_input_embeddings()
        name = next(name for name, module in self.base.named_modules() if module is inputs)
        return self._read_weight(f"{name.replace('.base_layer', '')}.weight")

    @torch.inference_mode()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Logits of each sequence, float32 [T, V], in order; the weights are read once per about 1024 tokens."""
        for group in _groups([len(ids) for ids in sequences]):
            longest = max(len(sequences[i]) for i in group)
            # Right padding without a mask: with causal attention no position sees what comes after it.
            padded = [list(sequences[i]) + [0] * (longest - len(sequences[i])) for i in group]
            hidden = self.base.get_decoder()(input_ids=torch.tensor(padded), use_cache=False).last_hidden_state
            real = torch.cat([hidden[row, : len(sequences[i])] for row, i in enumerate(group)])
            rows = self.base.get_output_embeddings()(real)
            start = 0
            for i in group:
                yield rows[start : start + len(sequences[i])].numpy()
                start += len(sequences[i])


def _with_adapter(base: Any, adapter: Path) -> Any:
    """Peft's model around the base, in float32; the adapter's own matrices, which are small, are loaded."""
    from peft import PeftModel

    # low_cpu_mem_usage assigns the loaded tensors instead of writing into the placeholders.
    return PeftModel.from_pretrained(base, str(adapter), low_cpu_mem_usage=True).float()


def _placeholders(model: torch.nn.Module) -> None:
    """Give every parameter its shape on the CPU with the memory of one number.

    peft puts an adapter on the device of the layer that it changes; on the meta device it would lose its values.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            empty = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(empty, requires_grad=False))


def _groups(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Consecutive sequences that are run together."""
    group: list[int] = []
    for i, length in enumerate(lengths):
        if group and (len(group) + 1) * max(length, *(lengths[j] for j in group)) > TOKENS_TOGETHER:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
