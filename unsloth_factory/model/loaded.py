"""The value that leaves `model`: weights on a device, with the few questions that the other stages ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass
class LoadedModel:
    """A causal language model, possibly with a LoRA adapter, ready on one device.

    Shapes: B rows, T tokens, h hidden size, V vocabulary.
    """

    model: Any
    """transformers' PreTrainedModel, or peft's PeftModel around it."""
    tokenizer: Any
    path: Path
    """Folder that the base weights came from."""
    engine: str
    engine_reason: str
    device: torch.device
    dtype: torch.dtype
    """Computation dtype; LoRA weights stay in float32."""
    quantized: bool
    fingerprint: str
    has_adapter: bool = False

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside (with LoRA layers in place, if any)."""
        return self.model.get_base_model() if self.has_adapter else self.model

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Final normed hidden states, [B, T, h].

        Packed rows carry no attention mask: transformers then reads the document borders from the positions that start
        again at 0, provided that no cache is used.
        """
        decoder = self.causal_lm.get_decoder()
        output = decoder(
            input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
        )
        return output.last_hidden_state

    @property
    def lm_head(self) -> torch.nn.Module:
        """The output projection, h -> V."""
        return self.causal_lm.get_output_embeddings()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        with self.model.disable_adapter():
            yield

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Within it the model answers as the base does (nothing to do when there is no adapter)."""
        return self._without_adapter() if self.has_adapter else nullcontext()

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer updates, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, total) parameters; NF4 storage counts the weights it holds, two a byte."""
        trainable = total = 0
        for parameter in self.model.parameters():
            packed = parameter.__class__.__name__ == "Params4bit" and parameter.dtype == torch.uint8
            count = parameter.numel() * 2 if packed else parameter.numel()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for, tokens."""
        return int(getattr(self.causal_lm.config, "max_position_embeddings", 0) or 2**31)
