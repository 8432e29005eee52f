"""Ollama's Modelfile: which file, which template, system prompt, stop strings and sampling.

Ollama's parser ends a value at the first three quotes, whatever follows becomes instructions, and it drops characters
that Go calls non-printing (U+3000, joiners). So such values are refused or reported; the REST interface keeps them all.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.export.go_template import go_template, learn_frame

SMALLEST_CONTEXT = 4096


@dataclass(frozen=True)
class OllamaModel:
    """What Ollama has to know beside the weights."""

    template: str | None
    """Go template; None leaves it to the Jinja template inside the GGUF."""
    system: str | None
    parameters: dict[str, Any] = field(default_factory=dict)
    """num_ctx, temperature, top_p, top_k, repeat_penalty, stop (list)."""
    notes: tuple[str, ...] = ()


def describe(
    template: ChatTemplate, *, thinking: bool | None, system: str | None, num_ctx: int, sampling: dict[str, float]
) -> OllamaModel:
    """Collect what Ollama needs.

    Args:
        template: The model's chat template.
        thinking: Mode of the training.
        system: System prompt of the training.
        num_ctx: Context length, tokens.
        sampling: temperature, top_p, top_k.
    """
    frame, reason = learn_frame(template)
    notes = []
    if frame is None:
        notes.append(
            f"No TEMPLATE is written: {reason}. Ollama then uses the chat template inside the GGUF file; if it "
            "cannot, it guesses one. Compare an answer with uf chat --gguf."
        )
    elif system and frame.system_start is None:
        notes.append("The chat template knows no system prompt: SYSTEM has no effect in Ollama.")
    lost = sorted({f"U+{ord(c):04X}" for c in system or "" if not _printable(c)})
    if lost:
        notes.append(
            f"The system prompt holds {', '.join(lost)}: ollama create drops them when it reads the Modelfile. "
            "uf deploy with a running server (REST) keeps them."
        )
    parameters = {
        "num_ctx": num_ctx,
        **sampling,
        # Ollama's own default of 1.1 changes the answers of every model.
        "repeat_penalty": 1.0,
        "stop": list(dict.fromkeys(template.stop_strings)),
    }
    go = go_template(frame, thinking) if frame else None
    return OllamaModel(go, system or None, parameters, tuple(notes))


def context_length(max_seq_length: int, max_positions: int | None, wanted: int | None = None) -> int:
    """num_ctx: as asked, else the trained length, at least 4096; never more than the model has positions."""
    length = wanted or max(max_seq_length, SMALLEST_CONTEXT)
    return min(length, max_positions) if max_positions else length


def _printable(character: str) -> bool:
    """Go's unicode.IsPrint, plus the line breaks and tabs that the parser keeps."""
    return character in "\n\t\r " or unicodedata.category(character)[0] in "LMNPS"


def render_modelfile(gguf: str, model: OllamaModel) -> str:
    """Text of the Modelfile.

    Args:
        gguf: Path of the GGUF file, absolute or relative to the Modelfile's folder.
        model: From `describe`.

    Raises:
        UserError: A value cannot be written so that Ollama reads it back.
    """
    if any(not _printable(c) for c in gguf) or "\n" in gguf:
        raise UserError(f"{gguf!r}: Ollama's Modelfile cannot name this path. Rename the folder or file.")
    lines = [f"FROM {gguf}"]
    if model.template is not None:
        lines.append(f"TEMPLATE {_block('template', model.template)}")
    if model.system:
        lines.append(f"SYSTEM {_block('system prompt', model.system)}")
    for key, value in model.parameters.items():
        for item in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {key} {_block(key, item) if isinstance(item, str) else item}")
    return "\n".join(lines) + "\n"


def _block(what: str, text: str) -> str:
    """A value in three quotes: nothing inside can be escaped."""
    if '"""' in text or text.endswith('"'):
        raise UserError(
            f'The {what} holds """ or ends with a quote, which a Modelfile cannot express (the rest would be read as '
            "instructions). Change it, for instance with --system."
        )
    bad = next((c for c in text if unicodedata.category(c) == "Cc" and c not in "\n\t\r" or c == "\ufeff"), None)
    if bad is not None:
        raise UserError(
            f"The {what} holds the control character U+{ord(bad):04X}. Remove it, for instance with --system."
        )
    return f'"""{text}"""'


def modelfile_path_of(gguf: Path, modelfile: Path) -> str:
    """How the Modelfile names the GGUF file: relative to its own folder where it lies below it."""
    gguf, folder = gguf.resolve(), modelfile.parent.resolve()
    return f"./{gguf.relative_to(folder).as_posix()}" if gguf.is_relative_to(folder) else gguf.as_posix()
