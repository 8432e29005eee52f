"""The value that leaves `model`: weights on a device, with the few questions that the other stages ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.kernels.transfer import to_device
from unsloth_factory.model.fast import pace
from unsloth_factory.model.fast.embedding import HostEmbedding
from unsloth_factory.model.fingerprint import AdapterInfo
from unsloth_factory.model.store import save_adapter, save_full

# Sampling settings that a generation_config may recommend.
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
TOKEN_KEYS = ("eos_token_id", "pad_token_id", "bos_token_id")


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
    """Computation dtype; LoRA weights and every trained parameter stay in float32."""
    quantized: bool
    fingerprint: str
    has_adapter: bool = False
    name: str = ""
    """What the user called the base: folder, hub id or "tiny"."""
    device_reason: str = ""
    matmul: str = "exact"
    """How products with the frozen weights are computed: "exact", in `dtype`, or "fp8"."""
    logit_bytes: int = 256 * 2**20
    """float32 logits that training holds at a time: 440 rows of Qwen3's vocabulary of 151,936."""
    quantization: dict[str, Any] | None = None
    """How the base is quantised, as `AdapterInfo` records it and `dequantize.BaseWeights` takes it."""
    notes: list[str] = field(default_factory=list)
    """Warnings for the user; the caller prints them."""

    @property
    def causal_lm(self) -> Any:
        """The transformers model inside (with LoRA layers in place, if any)."""
        return self.model.get_base_model() if self.has_adapter else self.model

    @property
    def decoder(self) -> Any:
        """What makes hidden states of token ids: transformers' decoder or the fast engine's."""
        # transformers finds its own classes alone
        return self.causal_lm.model if self.engine == "fast" else self.causal_lm.get_decoder()

    def autocast(self) -> AbstractContextManager[Any]:
        """Within it float32 parameters (LoRA, trained layers) compute in `dtype`; nothing to do where all is float32.

        `hidden_states` uses it by itself; put it around `model(...)` and `model.generate(...)`.
        """
        if self.dtype == torch.float32:
            return nullcontext()
        if self.engine == "fast" and self.lm_head.weight.dtype == self.dtype:  # its decoder casts by itself
            return nullcontext()
        mixed = self.has_adapter or any(p.requires_grad for p in self.model.parameters())
        return torch.autocast(self.device.type, dtype=self.dtype) if mixed else nullcontext()

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Final normed hidden states, [B, T, h], on the device; the arguments are best on the CPU.

        Packed rows carry no attention mask: transformers then reads the document borders from the positions that start
        again at 0, provided that no cache is used.
        """
        inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
        if self.engine != "fast":  # which finds the documents on the CPU, and would have to wait for the GPU
            inputs = {name: None if x is None else to_device(x, self.device) for name, x in inputs.items()}
        with self.autocast():
            output = self.decoder(**inputs, use_cache=False)
        return output.last_hidden_state

    def expect(self, input_ids: torch.Tensor) -> None:
        """What can be done ahead for the micro-batch that comes next, [B, T] on the CPU."""
        embedding = getattr(self.decoder, "embed_tokens", None)
        if isinstance(embedding, HostEmbedding):
            embedding.expect(input_ids.flatten())

    def hidden_rows(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        index: torch.Tensor,
    ) -> torch.Tensor:
        """`hidden_states` of some positions, [n, h].

        Args:
            input_ids: As there.
            position_ids: As there.
            attention_mask: As there.
            index: int64 [n] into the B T positions, each once, on the CPU. What no other position needs the fast engine
                does for these alone.
        """
        if self.engine == "fast":
            inputs = {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": attention_mask}
            with self.autocast():
                return self.decoder(**inputs, use_cache=False, index=index).last_hidden_state[0]
        hidden = self.hidden_states(input_ids, position_ids, attention_mask)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, to_device(index, self.device))

    @property
    def lm_head(self) -> torch.nn.Module:
        """The output projection, h -> V. Its weight is [V, h], in `dtype` or (when it trains) in float32."""
        return self.causal_lm.get_output_embeddings()

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        # peft marks the adapter as trainable when it is switched on again, also one that was loaded frozen.
        flags = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def adapter_disabled(self) -> AbstractContextManager[None]:
        """Within it the model answers as the base does (nothing to do when there is no adapter)."""
        return self._without_adapter() if self.has_adapter else nullcontext()

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """Parameters that the optimizer updates, in the model's order."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def optimized_parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer is given: the same numbers, with the fast engine in a few long tensors."""
        return self.decoder.adapter.parameters if self.engine == "fast" else self.trainable_parameters()

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, total) parameters; tied weights count once, a 4-bit tensor as the weights it stands for."""
        trainable = total = 0
        for parameter in self.model.parameters():
            state = getattr(parameter, "quant_state", None)
            count = parameter.numel() if state is None else int(torch.Size(state.shape).numel())
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    @property
    def vocabulary(self) -> int:
        """Logits of one position, V."""
        head = self.lm_head
        assert isinstance(head, torch.nn.Linear), f"the output projection is a {type(head).__name__}"
        return head.out_features

    @property
    def recomputes_layers(self) -> bool:
        """Gradient checkpointing is on; with the fast engine: for every layer, whatever memory there is."""
        if self.engine == "fast":
            return bool(self.decoder.planner.recomputes_all)
        return bool(self.causal_lm.is_gradient_checkpointing)

    def set_gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations (Chen et al. 2016, 1604.06174).

        Takes effect while the model is in training mode. The fast engine decides that by itself, layer by layer.
        """
        if self.engine == "fast":
            return
        if enabled:
            # The reentrant form needs inputs that require gradients and re-runs a layer to its very end.
            self.causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.causal_lm.gradient_checkpointing_disable()

    def recompute_layers(self) -> None:
        """From now on recompute every layer, for want of memory."""
        if self.engine == "fast":
            self.decoder.planner.recompute_all()
            self.give_up_memory()
        else:
            self.set_gradient_checkpointing(True)

    def offload_layers(self) -> None:
        """From now on recompute every layer from an input that waits in the CPU's memory.

        The fast engine alone does that itself: around the standard one it is done by `training.memory.offload`.
        """
        if self.engine == "fast":
            self.decoder.planner.offload_all()
            self.give_up_memory()

    def give_up_memory(self) -> None:
        """After memory ran out: free what is kept for speed alone."""
        if self.engine == "fast":
            self.decoder.give_up_memory()

    def allocate_gradients(self) -> None:
        """Give every trained parameter a gradient of zeros, where the first backward pass would put one."""
        if self.engine == "fast":
            self.decoder.adapter.prepare()
        for parameter in self.optimized_parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @property
    def token_budget(self) -> int | None:
        """Tokens of a micro-batch for which the fast engine recomputes nothing; None: as --batch_size says."""
        return self.decoder.planner.comfortable if self.engine == "fast" else None

    def micro_batch_costs(self, most: int) -> list[float]:
        """What micro-batches of up to `most` tokens take on this GPU (`fast.pace`); nothing from other engines."""
        if self.engine != "fast" or self.device.type != "cuda":
            return []
        return pace.measure(self.decoder.stack[0], most)

    def save_adapter(self, folder: Path, extra: dict[str, Any] | None = None) -> Path:
        """Write adapter_model.safetensors, adapter_config.json and unsloth_factory.json (with `extra` in it).

        Raises:
            UserError: A weight is not finite, or the disk is full.
        """
        assert self.has_adapter, "save_adapter of a model without an adapter"
        info = AdapterInfo(
            base_model=self.name,
            base_fingerprint=self.fingerprint,
            quantization=self.quantization,
            extra=extra or {},
        )
        return save_adapter(self.model, folder, info)

    def save_full(self, folder: Path) -> Path:
        """Write the whole model in 16 bit, with the base's tokenizer files; for full and freeze.

        Raises:
            UserError: A weight is not finite, or the disk is full; or the base is quantised.
        """
        if self.has_adapter or self.quantized:
            raise UserError("A model with an adapter or 4-bit weights is written by merge, not as a whole.")
        return save_full(self.model, self.path, folder)

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """What the model's generation_config recommends: sampling settings and token ids that it sets."""
        config = getattr(self.causal_lm, "generation_config", None)
        values = config.to_diff_dict() if config is not None else {}
        return {key: values[key] for key in SAMPLING_KEYS + TOKEN_KEYS if values.get(key) is not None}

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model was made for, tokens."""
        return int(getattr(self.causal_lm.config, "max_position_embeddings", 0) or 2**31)
