"""Models behind an OpenAI-compatible address, for `uf validate` and `uf evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel, resolve_source
from unsloth_factory.config.judging import EndpointSettings
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.evaluation.validation.validate import Questions, ValidationResult, validate
from unsloth_factory.inference.endpoint import Endpoint
from unsloth_factory.inference.generate import Generation, Progress
from unsloth_factory.inference.remote import RemoteModel, RemoteTemplate

NO_LIMIT = 2**31
"""The server knows its context, and refuses what does not fit."""


def resolve_asked(
    source: FinishedRun, model: ModelSettings, remote: EndpointSettings, *, quantization_bit: int | None = None
) -> ResolvedModel:
    """As `resolve_source`; a model behind an address needs no other, a run only tells how it was trained."""
    if remote.endpoint and source.run is None:
        return ResolvedModel(settings=model)
    return resolve_source(source, model, quantization_bit=quantization_bit)


def remote_model(settings: EndpointSettings, thinking: bool | None) -> RemoteModel:
    """The model that --endpoint and --endpoint_model name."""
    endpoint = Endpoint(str(settings.endpoint), settings.endpoint_model, key_variable=settings.endpoint_key_env)
    return RemoteModel(endpoint, RemoteTemplate(), thinking, settings.endpoint_concurrency)


def description(remote: RemoteModel) -> dict[str, Any]:
    """What a report says of it."""
    return {"model": remote.endpoint.model, "endpoint": remote.endpoint.url, "engine": "endpoint"}


def validate_endpoint(remote: RemoteModel, questions: Questions, console: Console) -> ValidationResult:
    """The validation of one model behind an address; it is the only variant, by its name."""

    def answer(prompts: Sequence[list[int]], asked: Questions, on_progress: Progress | None) -> list[Generation]:
        return remote.answer(
            prompts, max_new_tokens=asked.max_new_tokens, sampling=asked.sampling, on_progress=on_progress
        )

    with counting(console, "answers") as progress:
        return validate(
            {remote.endpoint.model: answer},
            questions,
            max_positions=NO_LIMIT,
            model=description(remote),
            on_progress=progress,
        )
