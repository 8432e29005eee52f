"""`uf quantize`: smaller GGUF files from the 16-bit one."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.quality import HeldOut, measure_and_judge, read_held_out
from unsloth_factory.commands.source import resolve_source
from unsloth_factory.commands.training_matrix import training_matrix
from unsloth_factory.config.commands import QuantizeConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, ModelSettings
from unsloth_factory.export.progress import say, summary_line
from unsloth_factory.export.quantize import parse_types, quantize
from unsloth_factory.run.folder import RunFolder


def run(config: QuantizeConfig) -> int:
    """Write one file per type."""
    types = parse_types(config.types, imatrix=config.imatrix)
    source = _source(config)
    folder = Path(config.output) if config.output else source.parent
    # Read before hours of quantising: a gate without held-out answers must not fail after them.
    held_out = _held_out(config) if config.quality.gate is not None else None
    matrix = training_matrix(config.source.run, source) if config.imatrix else None
    results = quantize(source, folder, types, imatrix=matrix)
    for result in results:
        say(summary_line(result))
    if held_out is None:
        return 0
    target = held_out.resolved.results("quality_results", None)
    return measure_and_judge(
        [source, *(result.path for result in results)], held_out, config.quality, target, Console()
    )


def _held_out(config: QuantizeConfig) -> HeldOut:
    """What the gate measures on."""
    if config.source.run is None:
        raise UsageError(
            f"--gate {config.quality.gate:g} needs --run of a training that held samples out; for other files: "
            "uf quality --gguf FILES --model FOLDER --dataset FILE --gate LIMIT."
        )
    return read_held_out(resolve_source(config.source, ModelSettings()), DataSettings())


def _source(config: QuantizeConfig) -> Path:
    """The GGUF file asked for, else the run's 16-bit one."""
    if config.gguf:
        return Path(config.gguf)
    if config.source.run is None:
        raise UsageError("Which file? Give --run FOLDER of a training, or --gguf FILE.")
    folder = RunFolder(Path(config.source.run).expanduser())
    folder.read()
    for kind in ("f16", "bf16", "f32"):
        found = sorted(folder.gguf.glob(f"*-{kind}.gguf"))
        if found:
            return found[0]
    raise UserError(f"{folder.gguf} has no f16 or bf16 file. Make it first: uf gguf --run {folder.path}")
