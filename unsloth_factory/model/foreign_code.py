"""What could make a library run code, or read files, that a model folder chooses: refused before any library sees it.

transformers and peft run Python from a folder or a hub when its JSON files say so and they are told to trust it (we
never do); some versions did it without being told (CVE-2026-4372, CVE-2026-5241). So such keys are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.weight_files import read_json

# Keys that name a Python file or a class in one (model_file is mlx-lm's, CVE-2026-5843).
CODE_KEYS = (
    "auto_map", "custom_pipelines", "custom_generate", "model_file", "_attn_implementation_internal",
    "_experts_implementation_internal", "trust_remote_code",
)  # fmt: skip
# Keys whose value may name a kernel on a hub (org/name), which is code as well.
KERNEL_KEYS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")
# Settings of an adapter that peft looks up by importing a module.
IMPORT_KEYS = ("megatron_config",)
# Settings of an adapter whose texts peft uses as regular expressions; a repeated group can take for ever.
PATTERN_KEYS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
REPEATED_GROUP = re.compile(r"\)\s*[*+{]")


def refuse_code_in_folder(folder: Path) -> None:
    """Read config.json and every other *config.json of a model folder for keys that run code.

    Raises:
        UserError: One is there; or a file is no JSON object.
    """
    for path in sorted(folder.glob("*config.json")):
        refuse_code(path, read_json(path))


def refuse_code(path: Path, config: dict[str, Any]) -> None:
    """Refuse a config (of the file `path`, for the message) that names code outside the libraries.

    Raises:
        UserError: Names the keys.
    """
    found = sorted({key for key, value in _items(config) if _runs_code(key, value)})
    if found:
        raise UserError(
            f"{path} asks for Python code from outside transformers ({', '.join(found)}). Such code is never run here "
            "(no trust_remote_code). Use a model that transformers supports by itself; if it does support this one, "
            f"delete {' and '.join(found)} from the file."
        )


def _runs_code(key: str, value: Any) -> bool:
    if key == "trust_remote_code":
        return bool(value)
    texts = value.values() if isinstance(value, dict) else [value]
    return key in CODE_KEYS or (key in KERNEL_KEYS and any("/" in str(text) for text in texts))


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key at any depth with its value; iterative, because depth is the file's choice."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def refuse_adapter_code(path: Path, config: dict[str, Any]) -> None:
    """Refuse an adapter_config.json that makes peft import a module or run an endless pattern.

    Raises:
        UserError: Names the key.
    """
    refuse_code(path, config)
    for key in IMPORT_KEYS:
        if config.get(key):
            raise UserError(f"{path}: {key} makes peft import a module that the file names; it is never done here.")
    for key in PATTERN_KEYS:
        value = config.get(key)
        texts = [value] if isinstance(value, str) else list(value or ())
        bad = next((text for text in texts if not _is_plain_pattern(text)), None)
        if bad is not None:
            raise UserError(
                f"{path}: {key} holds {str(bad)[:80]!r}, which is no pattern or one that repeats a group (it could run "
                "for ever). List the module names instead."
            )
    patterns = config.get("alpha_pattern") or {}
    numbers = [config.get("lora_alpha"), *(patterns.values() if isinstance(patterns, dict) else ["no object"])]
    if any(value is not None and not isinstance(value, int | float) for value in numbers):
        raise UserError(f"{path}: lora_alpha and the values of alpha_pattern must be numbers. Copy the adapter again.")


def _is_plain_pattern(text: Any) -> bool:
    if not isinstance(text, str) or REPEATED_GROUP.search(text):
        return False
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def load_config(folder: Path) -> Any:
    """The configuration of a checked folder, of an architecture that answers.

    transformers would build any of its several hundred configurations, some of which load further models that the
    file names; only causal language models are let through.

    Raises:
        UserError: Another architecture.
    """
    from transformers import AutoConfig

    require_language_model(folder)
    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def require_language_model(folder: Path) -> None:
    """Refuse what transformers does not know as a causal language model.

    Raises:
        UserError: Names the model type.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = read_json(folder / "config.json").get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(
            f"{folder / 'config.json'}: model_type {str(kind)[:80]!r} is no causal language model of this transformers "
            "version. Use another model, or a newer version."
        )


def refuse_foreign_link(folder: Path, path: Path) -> None:
    """Refuse to copy a link that leaves its folder: what it points at would be shipped with the model.

    The hub's local copy is made of links into its own store (snapshots/REVISION/NAME -> blobs/HASH): these are fine.

    Raises:
        UserError: The link's target lies elsewhere.
    """
    target, root = path.resolve(), folder.resolve()
    store = root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not (root.parent.name == "snapshots" and target.is_relative_to(store)):
        raise UserError(
            f"{path} is a link to {target}, outside the model's folder: it is not copied. Put the file there."
        )
