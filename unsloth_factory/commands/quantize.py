"""`uf quantize`: smaller GGUF files from the 16-bit one."""

from __future__ import annotations

from pathlib import Path

from unsloth_factory.config.commands import QuantizeConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export.progress import say, summary_line
from unsloth_factory.export.quantize import parse_types, quantize
from unsloth_factory.run.folder import RunFolder


def run(config: QuantizeConfig) -> int:
    """Write one file per type."""
    types = parse_types(config.types)
    source = _source(config)
    folder = Path(config.output) if config.output else source.parent
    for result in quantize(source, folder, types):
        say(summary_line(result))
    return 0


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
