"""How surprised each variant of a model is by the reference answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import TokenSample, Turn
from unsloth_factory.evaluation.validation.answers import Sample
from unsloth_factory.inference.perplexity import AnswerLoss, answer_losses
from unsloth_factory.model.loaded import LoadedModel

Losses = Callable[[Sequence[Sample]], "list[AnswerLoss | None]"]
"""Samples -> the loss of each reference; None where it does not fit the context or cannot be rendered."""


def model_losses(
    loaded: LoadedModel, template: ChatTemplate, variants: Sequence[str], batch_size: int
) -> Mapping[str, Losses]:
    """What measures the references for each variant of one loaded model; "base" switches the adapter off.

    Prompt and reference are encoded as training encodes them: with thinking on where the reference has reasoning.
    """

    def losses_of(variant: str) -> Losses:
        def losses(samples: Sequence[Sample]) -> list[AnswerLoss | None]:
            encoded = [_encode(sample, template, loaded.max_positions) for sample in samples]
            fitting = [sample for sample in encoded if sample is not None]
            with loaded.adapter_disabled() if variant == "base" else nullcontext():
                measured = iter(answer_losses(loaded, fitting, batch_size=batch_size))
            return [None if sample is None else next(measured) for sample in encoded]

        return losses

    return {variant: losses_of(variant) for variant in variants}


def _encode(sample: Sample, template: ChatTemplate, max_positions: int) -> TokenSample | None:
    turns = (*sample.prompt, Turn("assistant", sample.reference, sample.reasoning))
    try:
        encoded = template.encode_answer(turns, sample.source)
    except UserError:  # no reason to lose the answers
        return None
    return encoded if len(encoded.ids) <= max_positions and encoded.trained[1:].any() else None
