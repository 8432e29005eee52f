"""What a training gives up for memory: each lever leaves samples, order and loss of a step as they are."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from unsloth_factory.model.loaded import LoadedModel


@dataclass
class Levers:
    """Levers in force; stored with the loop's state, so that a resumed run keeps them."""

    micro_batch_tokens: int | None = None
    """Most tokens of a micro-batch that holds several samples; None: as --batch_size says."""
    eval_tokens: int | None = None
    """The same for the evaluation, which keeps no activations and fits more."""
    logit_bytes: int | None = None
    """float32 logits of one chunk; None: `LoadedModel.logit_bytes` as it was loaded."""
    checkpointing: bool = False
    """Layers are computed again in the backward pass although --no_gradient_checkpointing was asked for."""
    offload: bool = False
    """Activations wait in the CPU's memory; with the fast engine: the inputs of all layers."""

    @classmethod
    def of(cls, values: dict[str, Any] | None) -> Levers:
        """From a checkpoint's values; what an older version did not know keeps its default."""
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in (values or {}).items() if key in known})

    def joined(self, other: Levers) -> Levers:
        """The smaller of each limit and the union of the switches."""
        return Levers(
            micro_batch_tokens=_smaller(self.micro_batch_tokens, other.micro_batch_tokens),
            eval_tokens=_smaller(self.eval_tokens, other.eval_tokens),
            logit_bytes=_smaller(self.logit_bytes, other.logit_bytes),
            checkpointing=self.checkpointing or other.checkpointing,
            offload=self.offload or other.offload,
        )

    def apply(self, loaded: LoadedModel) -> None:
        """Set on the model what is the model's business."""
        if self.logit_bytes is not None:
            loaded.logit_bytes = min(loaded.logit_bytes, self.logit_bytes)
        if self.checkpointing:
            loaded.recompute_layers()
        if self.offload:
            loaded.offload_layers()

    def __str__(self) -> str:
        parts = []
        if self.micro_batch_tokens is not None:
            parts.append(f"at most {self.micro_batch_tokens:,} tokens in a micro-batch of several samples")
        if self.logit_bytes is not None:
            parts.append(f"logits in chunks of {self.logit_bytes / 2**20:,.3g} MiB")
        if self.checkpointing:
            parts.append("layers computed again in the backward pass")
        if self.offload:
            parts.append("activations in the CPU's memory")
        if self.eval_tokens is not None:
            parts.append(f"at most {self.eval_tokens:,} tokens in an evaluation micro-batch of several samples")
        return ", ".join(parts)


def _smaller(one: int | None, other: int | None) -> int | None:
    given = [value for value in (one, other) if value is not None]
    return min(given) if given else None
