"""From what the user called the model to a checked folder on this disk."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.foreign_code import refuse_code_in_folder
from unsloth_factory.model.weight_files import INDEX_NAME, SINGLE_NAME, read_header, read_json, shard_paths

TINY_NAME = "tiny"
TINY_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "tiny_model"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# Pickles run code when they are opened (CVE-2025-32434 shows that weights_only is no boundary).
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# Files that a download takes: never pickles, never Mistral's second copy of the weights.
DOWNLOAD_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "model*.safetensors", "LICENSE*"]


def resolve_model(name: str | None, hub: str = "hf") -> Path:
    """Folder of a model that is safe and complete.

    Args:
        name: "tiny", a local folder, or a hub id `org/name`. Only a hub id may reach the network, and only when it
            is not in the hub's local cache.
        hub: "hf" or "modelscope", where a hub id is looked up.

    Raises:
        UserError: Nothing of that name, or a folder that is incomplete or would run foreign code.
    """
    if not name:
        raise UserError('--model is missing. Give a model folder, a hub id such as Qwen/Qwen3-8B, or "tiny".')
    if name == TINY_NAME and not Path(name).is_dir():
        return check_model_folder(TINY_FOLDER)
    path = Path(name).expanduser()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise UserError(f"--model {name[:80]}: {error.strerror}. Give a model folder or a hub id.") from error
    if is_folder:
        return check_model_folder(path)
    if exists:
        raise UserError(
            f"--model {name} is a file. Give the folder that holds config.json and the safetensors weights."
        )
    if is_hub_id(name):
        return _from_hub(name, hub)
    raise UserError(f"--model {name}: no such folder.{_near_names(path)}")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads as org/name on a hub; what could be a path with a typing error in it does not."""
    return bool(HUB_ID.fullmatch(name)) and not Path(name).parent.is_dir()


def _near_names(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        while not parent.is_dir():
            parent = parent.parent
        return f" The path exists as far as {parent}."
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return " Did you mean " + " or ".join(str(parent / match) for match in close) + "?"
    shown = ", ".join(names[:8]) or "no folder"
    return f" {parent} holds: {shown}. A hub id is written org/name."


def check_model_folder(folder: Path) -> Path:
    """Refuse a folder that is incomplete, cut short, or would run code; return it.

    Raises:
        UserError: With the file, the reason and what to do.
    """
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"--model {folder} holds an adapter (adapter_config.json). Give --adapter {folder} and the base model "
            "as --model."
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"--model {folder} has no config.json: it is not a model folder in the Hugging Face layout.")
    config = read_json(folder / "config.json")
    refuse_code_in_folder(folder)
    _refuse_foreign_quantization(folder / "config.json", config)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{folder / 'config.json'} has no model_type, so that its architecture is unknown.")
    _check_weights(folder)
    _check_tokenizer(folder)
    return folder


def _refuse_foreign_quantization(path: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method", "bitsandbytes") if isinstance(quantization, dict) else quantization
    if method != "bitsandbytes" or not quantization.get("load_in_4bit"):
        raise UserError(
            f"{path}: the weights are stored quantised ({method}). Only 16/32-bit and bitsandbytes 4-bit weights can "
            "be trained and merged here; use the original model."
        )


def _check_weights(folder: Path) -> None:
    if not (folder / SINGLE_NAME).is_file() and not (folder / INDEX_NAME).is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise UserError(
                f"--model {folder} has its weights in {pickles[0]} only. Pickle files can run code when opened and are "
                "never read here; use a safetensors version of the model (most hubs have one), or convert it in a "
                "sandbox."
            )
        raise UserError(f"--model {folder} has no weights: neither {SINGLE_NAME} nor {INDEX_NAME} is there.")
    for shard in shard_paths(folder):
        read_header(shard)


def _check_tokenizer(folder: Path) -> None:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"--model {folder} has no tokenizer ({', '.join(TOKENIZER_FILES[:3])} ...). Copy it there.")


def _from_hub(name: str, hub: str) -> Path:
    if hub == "modelscope":
        return check_model_folder(_from_modelscope(name))
    return check_model_folder(_from_hugging_face(name))


def _from_hugging_face(name: str) -> Path:
    """The hub's local copy when it is whole, else a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        return check_model_folder(cached)
    except (LocalEntryNotFoundError, HFValidationError, UserError):
        pass  # not there, or only a part of it: the download below says what is wrong
    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOAD_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--model {name}: no folder of that name here, and it cannot be downloaded from Hugging Face{offline}: "
            f"{reason} Check the name and the connection, use --hub modelscope, or give a local folder."
        ) from error


def _from_modelscope(name: str) -> Path:
    if importlib.util.find_spec("modelscope") is None:
        raise UserError(
            "--hub modelscope needs the package modelscope: pip install modelscope. Or give --model a local folder."
        )
    from modelscope import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOAD_PATTERNS))
    except Exception as error:  # its own and requests' exceptions share no base class
        raise UserError(
            f"--model {name} cannot be downloaded from ModelScope: {error}. Check the name and the connection."
        ) from error
