"""Which model a later command works with: what the run recorded, unless a flag says otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.knowledge import DomainPack, PackError, load_pack
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.model.paths import resolve_model
from unsloth_factory.model.standard import load_tokenizer
from unsloth_factory.run.folder import RunFolder, RunManifest

Variant = Literal["base", "tuned"]
_KEPT: ContextVar[dict[str, tuple[LoadedModel, ChatTemplate]] | None] = ContextVar("_KEPT", default=None)
PROBE = "你好，血压 120/80。Hello!\n<think>"


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """The model of a command, with all that its run knows of it."""

    settings: ModelSettings
    """Model, adapter and chat template filled in."""
    folder: RunFolder | None = None
    manifest: RunManifest | None = None
    quantization_bit: int | None = None
    thinking: bool | None = None
    """enable_thinking of the training prompts; None for unset."""
    domain: str | None = None
    system: str | None = None
    """System prompt of the training."""

    @property
    def variants(self) -> tuple[Variant, ...]:
        """What one load can answer as: an adapter can be switched off, a fully tuned model cannot."""
        if self.settings.adapter:
            return ("base", "tuned")
        return ("tuned",) if self.manifest else ("base",)

    def results(self, name: str, save_dir: str | None) -> Path:
        """Folder for results: as asked, else `name` in the run folder, else in output/."""
        if save_dir:
            return Path(save_dir)
        return (self.folder.path if self.folder else Path("output")) / name

    def description(self, loaded: LoadedModel) -> dict[str, Any]:
        """What a report says of the model."""
        return {
            "model": self.settings.model,
            "adapter": self.settings.adapter,
            "fingerprint": loaded.fingerprint,
            "engine": loaded.engine,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "device": str(loaded.device),
            "quantized": loaded.quantized,
        }


def resolve_source(source: FinishedRun, model: ModelSettings, *, quantization_bit: int | None = None) -> ResolvedModel:
    """Read the run and let explicit flags win over it.

    With `--run` the model is the run's base with its final adapter (its final model after full or freeze training).
    `--adapter` replaces the adapter, `--model` the base; a `--model` other than the base of a full training replaces
    the tuned model.

    Raises:
        UsageError: Neither --run nor --model is given.
        UserError: The run folder is none, or its training has not finished.
    """
    if source.run is None:
        if model.model is None:
            raise UsageError("Which model? Give --run FOLDER of a training, or --model.")
        return ResolvedModel(settings=model, quantization_bit=quantization_bit)
    folder = RunFolder(Path(source.run).expanduser())
    manifest = folder.read()
    tuned = _tuned(folder, manifest, model)
    recorded = 4 if manifest.quantization_bit == 4 and manifest.finetuning_type == "lora" else None
    return ResolvedModel(
        settings=replace(tuned, chat_template=model.chat_template or _template_file(folder)),
        folder=folder,
        manifest=manifest,
        quantization_bit=quantization_bit or recorded,
        thinking=manifest.thinking_flag,
        domain=manifest.domain,
        system=manifest.system,
    )


def _tuned(folder: RunFolder, manifest: RunManifest, model: ModelSettings) -> ModelSettings:
    """The model settings with the run's base and what it trained."""
    if manifest.finetuning_type == "lora":
        adapter = model.adapter or str(folder.final_adapter)
        if model.adapter is None and not folder.final_adapter.is_dir():
            raise UserError(_unfinished(folder, folder.final_adapter))
        return replace(model, model=model.model or manifest.model, adapter=adapter)
    if model.model is None and not folder.final_model.is_dir():
        raise UserError(_unfinished(folder, folder.final_model))
    return replace(model, model=model.model or str(folder.final_model))


def _unfinished(folder: RunFolder, missing: Path) -> str:
    return (
        f"{folder.path} has no {missing.name}: its training has not finished. "
        f"Go on with it: --output_dir {folder.path} --resume auto."
    )


def _template_file(folder: RunFolder) -> str | None:
    return str(folder.template) if folder.template.is_file() else None


@contextmanager
def keeping_loaded() -> Iterator[None]:
    """Within it a model that is asked for again is not loaded again; behind it nothing is kept."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def load_source(resolved: ResolvedModel, console: Console) -> tuple[LoadedModel, ChatTemplate]:
    """Load the model and its template, and print what was chosen."""
    kept, key = _KEPT.get(), repr((resolved.settings, resolved.quantization_bit))
    if kept is not None and key in kept:
        return kept[key]
    found = _load_source(resolved, console)
    if kept is not None:
        kept[key] = found
    return found


def _load_source(resolved: ResolvedModel, console: Console) -> tuple[LoadedModel, ChatTemplate]:
    loaded = load_model(resolved.settings, quantization_bit=resolved.quantization_bit)
    for line in (f"engine {loaded.engine}: {loaded.engine_reason}", loaded.device_reason, *loaded.notes):
        if line:
            console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    return loaded, source_template(resolved, loaded.tokenizer, loaded.generation_defaults.get("eos_token_id"))


def source_template(resolved: ResolvedModel, tokenizer: Any, eos: int | list[int] | None = None) -> ChatTemplate:
    """The chat template that the run was trained with, or the model's own."""
    eos_ids = [eos] if isinstance(eos, int) else list(eos or [])
    return ChatTemplate.from_tokenizer(tokenizer, resolved.settings.chat_template, eos_ids=eos_ids)


def gguf_template(resolved: ResolvedModel) -> ChatTemplate:
    """The chat template for a GGUF file: of the run or model that it was made from, without loading any weight."""
    folder = resolve_model(resolved.settings.model, resolved.settings.hub)
    defaults = folder / "generation_config.json"
    eos = json.loads(defaults.read_text(encoding="utf-8")).get("eos_token_id") if defaults.is_file() else None
    return source_template(resolved, load_tokenizer(folder), eos)


def require_same_tokenizer(model: LlamaCpp, template: ChatTemplate, resolved: ResolvedModel) -> None:
    """Refuse a GGUF file that was made from another model.

    Raises:
        UserError: It splits a probe text into other tokens.
    """
    if model.tokenize(PROBE) != template.tokenizer.encode(PROBE, add_special_tokens=False):
        raise UserError(
            f"{model.path.name} splits text into other tokens than {resolved.settings.model}: it was made from another "
            "model. Give the --run or --model that it came from."
        )


def domain_pack(resolved: ResolvedModel, domain: str | None) -> DomainPack | None:
    """The pack asked for by --domain, else the run's.

    Raises:
        UserError: It is unknown or broken.
    """
    name = domain or resolved.domain
    try:
        return load_pack(name) if name else None
    except PackError as error:
        raise UserError(str(error)) from error


def system_prompt(resolved: ResolvedModel, system: str | None, domain: str | None) -> str | None:
    """--system, else the prompt of --domain, else what the run was trained with."""
    if system is not None:
        return system or None
    if domain is not None:
        pack = domain_pack(resolved, domain)
        return pack.system_prompt if pack else None
    if resolved.system is None and resolved.domain:
        pack = domain_pack(resolved, None)
        return pack.system_prompt if pack else None
    return resolved.system
