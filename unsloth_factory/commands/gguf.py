"""`uf gguf`: the merged model as a GGUF file that answers like it."""

from __future__ import annotations

from pathlib import Path

from unsloth_factory.config.commands import GgufConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.data.split import read_validation_split
from unsloth_factory.data.types import Turn
from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.export.progress import say, summary_line
from unsloth_factory.run.folder import RunFolder, RunManifest

HELD_OUT_QUESTIONS = 4


def run(config: GgufConfig) -> int:
    """Convert, check, publish."""
    folder = RunFolder(Path(config.source.run).expanduser()) if config.source.run else None
    manifest = folder.read() if folder else None
    model = merged_folder(folder, config.model)
    output = _output(config, folder)
    options = GgufOptions(
        outtype=config.outtype,
        llama_cpp=config.llama_cpp,
        check=not config.no_check,
        thinking=manifest.thinking if manifest else "unset",
        system=manifest.system if manifest else None,
        questions=_questions(folder, manifest),
        name=folder.path.resolve().name if folder else "",
    )
    say(summary_line(convert(model, output, options)))
    return 0


def merged_folder(folder: RunFolder | None, model: str | None) -> Path:
    """The model to convert: as asked, else what the run merged, or trained in full.

    Raises:
        UsageError: Neither --run nor --model.
        UserError: The folder is missing.
    """
    if model is not None:
        if not Path(model).is_dir():
            raise UserError(f"--model {model}: no such folder. Give the folder of a merged model (uf merge).")
        return Path(model)
    if folder is None:
        raise UsageError("Which model? Give --run FOLDER of a training, or --model FOLDER of a merged model.")
    for candidate in (folder.merged_model, folder.final_model):
        if candidate.is_dir():
            return candidate
    raise UserError(f"{folder.path} has no merged model. Make it first: uf merge --run {folder.path}")


def _output(config: GgufConfig, folder: RunFolder | None) -> Path:
    if config.output:
        path = Path(config.output)
        if path.suffix != ".gguf":
            raise UsageError(f"--output {path}: the name of a GGUF file ends in .gguf.")
        return path
    if folder is None:
        raise UsageError("Where to? Without --run give --output FILE.gguf.")
    return folder.gguf / f"{folder.path.resolve().name}-{config.outtype}.gguf"


def _questions(folder: RunFolder | None, manifest: RunManifest | None) -> tuple[tuple[Turn, ...], ...]:
    """Prompts of the first held-out conversations of the run."""
    if folder is None or manifest is None or not folder.validation_split.is_file():
        return ()
    conversations = read_validation_split(folder.validation_split)[:HELD_OUT_QUESTIONS]
    prompts = (c.turns[:-1] if c.turns[-1].role == "assistant" else c.turns for c in conversations)
    return tuple(prompt for prompt in prompts if prompt and prompt[-1].role == "user")
