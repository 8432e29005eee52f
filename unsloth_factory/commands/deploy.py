"""`uf deploy`: the Modelfile, and the model in Ollama when a server answers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from unsloth_factory.commands.picked import read_pick, require_judged
from unsloth_factory.commands.source import gguf_template, resolve_source
from unsloth_factory.config.commands import DeployConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.export.gguf import load_template
from unsloth_factory.export.modelfile import OllamaModel, context_length, describe, modelfile_path_of, render_modelfile
from unsloth_factory.export.ollama import OllamaServer, check_name
from unsloth_factory.export.progress import say
from unsloth_factory.export.sums import verify_file, write_folder_sums
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.model.paths import resolve_model
from unsloth_factory.model.weight_files import read_json
from unsloth_factory.run.atomic import write_text
from unsloth_factory.run.folder import RunFolder


def run(config: DeployConfig) -> int:
    """Describe the model, write the Modelfile, create the model."""
    folder = RunFolder(Path(config.source.run).expanduser()) if config.source.run else None
    gguf = _gguf(config, folder)
    read_header(gguf)
    digest = verify_file(gguf)
    if not config.gguf and folder:
        require_judged(folder, digest)
    name = check_name(config.name or _name(folder.path if folder else gguf))
    model = _describe(config, folder, gguf)
    modelfile = folder.modelfile if folder else gguf.parent / "Modelfile"
    write_text(modelfile, render_modelfile(modelfile_path_of(gguf, modelfile), model))
    relative = Path(modelfile_path_of(gguf, modelfile).removeprefix("./"))
    known = {} if relative.is_absolute() else {relative.as_posix(): digest}
    write_folder_sums(modelfile.parent, [modelfile.name], known=known)
    say(f"wrote {modelfile}")
    for note in model.notes:
        say(note, warn=True)
    _create(config, name, (gguf, digest), modelfile, model, folder)
    return 0


def _create(
    config: DeployConfig,
    name: str,
    gguf: tuple[Path, str],
    modelfile: Path,
    model: OllamaModel,
    folder: RunFolder | None,
) -> None:
    """Through the server when one answers; else say how to do it by hand."""
    server = OllamaServer(config.ollama_host)
    off = (
        " --think=false"
        if folder and folder.read().thinking == "off" and "$.IsThinkSet" in (model.template or "")
        else ""
    )
    version = server.version()
    if version is None:
        say(f"No Ollama answers at {server.address}. The files are ready; where Ollama runs:")
        say(f"  ollama create {name} -f {shlex.quote(str(modelfile))}")
        say(f"  ollama run {name}{off}")
        return
    server.create(name, gguf[0], model, digest=gguf[1])
    say(f"created {name} in Ollama {version} at {server.address}. Talk to it: ollama run {name}{off}")


def _gguf(config: DeployConfig, folder: RunFolder | None) -> Path:
    """The file asked for, else the one that the quality gate picked, else the run's smallest."""
    if config.gguf:
        return Path(config.gguf)
    if folder is None:
        raise UsageError("Which file? Give --run FOLDER of a training, or --gguf FILE.")
    folder.read()
    picked = read_pick(folder)
    if picked:
        say(f"{picked.path}: picked by the quality gate ({picked.what})")
        return picked.path
    found = sorted(folder.gguf.glob("*.gguf"), key=lambda path: path.stat().st_size)
    if not found:
        raise UserError(f"{folder.gguf} has no GGUF file. Make one first: uf gguf --run {folder.path}")
    return found[0]


def _name(path: Path) -> str:
    """A name that Ollama takes, from a folder's or file's name."""
    cleaned = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.resolve().stem).strip("-._").lower()
    return cleaned or "unsloth-factory"


def _describe(config: DeployConfig, folder: RunFolder | None, gguf: Path) -> OllamaModel:
    if folder is None:
        length = config.num_ctx or context_length(0, None)
        note = (
            "Without --run the chat template, stop strings and system prompt of the training are unknown here: Ollama "
        )
        note += "takes them from the GGUF file."
        parameters = {"num_ctx": length, "temperature": config.temperature}
        return OllamaModel(None, config.system, parameters, (note,))
    manifest = folder.read()
    merged, template = _origin(folder)
    positions = read_json(merged / "config.json").get("max_position_embeddings")
    defaults = read_json(merged / "generation_config.json") if (merged / "generation_config.json").is_file() else {}
    sampling = {"temperature": config.temperature}
    sampling |= {key: defaults[key] for key in ("top_p", "top_k", "min_p") if defaults.get(key) is not None}
    return describe(
        template,
        thinking=manifest.thinking_flag,
        system=manifest.system if config.system is None else config.system,
        num_ctx=context_length(manifest.max_seq_length, positions, config.num_ctx),
        sampling=sampling,
    )


def _origin(folder: RunFolder) -> tuple[Path, ChatTemplate]:
    """The merged model and its template; where it was deleted to save room, the run's base says the same."""
    if folder.merged_model.is_dir():
        return folder.merged_model, load_template(folder.merged_model)
    resolved = resolve_source(FinishedRun(run=str(folder.path)), ModelSettings())
    return resolve_model(resolved.settings.model, resolved.settings.hub), gguf_template(resolved)
