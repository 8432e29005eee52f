"""`uf merge`: the adapter written into 16-bit weights."""

from __future__ import annotations

from pathlib import Path

from unsloth_factory.commands.source import ResolvedModel, resolve_source, source_template
from unsloth_factory.config.commands import MergeConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.export.merge import MergeOptions, merge, publish_trained
from unsloth_factory.export.progress import say, summary_line
from unsloth_factory.model.noise import quiet_libraries
from unsloth_factory.model.paths import resolve_model
from unsloth_factory.model.standard import load_tokenizer


def run(config: MergeConfig) -> int:
    """Merge, compare, publish."""
    resolved = resolve_source(config.source, config.model)
    output = _output(config, resolved)
    base = resolve_model(resolved.settings.model, resolved.settings.hub)
    if resolved.settings.adapter is None:
        if resolved.manifest is None:
            raise UsageError("Merge what? Give --run FOLDER of a training, or --model with --adapter.")
        say(f"{resolved.manifest.finetuning_type} training: nothing to merge; the weights of {base} are linked.")
        result = publish_trained(base, output, overwrite=config.overwrite)
    else:
        options = MergeOptions(
            dtype=config.dtype,
            max_shard_size=config.max_shard_size,
            base_weights=config.base_weights,
            compare_base_weights=config.compare_base_weights,
            overwrite=config.overwrite,
            base_name=resolved.settings.model or "",
            chat_template=_template_text(base, resolved),
            validation_split=resolved.folder.validation_split if resolved.folder else None,
        )
        with quiet_libraries():
            result = merge(base, Path(resolved.settings.adapter), output, options)
    say(summary_line(result))
    return 0


def _output(config: MergeConfig, resolved: ResolvedModel) -> Path:
    if config.output:
        return Path(config.output)
    if resolved.folder is None:
        raise UsageError("Where to? Without --run give --output FOLDER.")
    return resolved.folder.merged_model


def _template_text(base: Path, resolved: ResolvedModel) -> str | None:
    """Jinja text of the run's template; None leaves the base's own."""
    if resolved.settings.chat_template is None:
        return None
    return source_template(resolved, load_tokenizer(base)).source
