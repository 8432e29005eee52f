"""The importance matrix of a run's own training text, for `uf quantize --imatrix`."""

from __future__ import annotations

import random
from dataclasses import fields
from pathlib import Path
from typing import Any

from unsloth_factory.commands.source import domain_pack, gguf_template, resolve_source, system_prompt
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, FinishedRun, ModelSettings
from unsloth_factory.data.load import load_conversations, load_pairs
from unsloth_factory.data.training_data import training_data
from unsloth_factory.data.types import Conversation
from unsloth_factory.export.imatrix import PIECE, PIECES, find_programs, make_imatrix
from unsloth_factory.knowledge import TermNormalizer


def training_matrix(run: str | None, source: Path) -> Path:
    """Write and return gguf/imatrix/NAME.gguf beside the 16-bit file.

    The text is what the run was trained on, in its chat template and in a seeded order; held-out samples stay out, so
    that the quality gate still judges on answers that nothing was fitted to.

    Raises:
        UsageError: There is no run.
        UserError: A program is missing, or the training data cannot be read any more.
    """
    find_programs()
    if run is None:
        raise UsageError("--imatrix needs --run of a training: its text says which weights matter.")
    resolved = resolve_source(FinishedRun(run=run), ModelSettings())
    assert resolved.manifest is not None
    known = {field.name for field in fields(DataSettings)}  # another version's run may say more
    recorded = {name: value for name, value in resolved.manifest.config.get("data", {}).items() if name in known}
    conversations = _training_conversations(resolved, DataSettings(**recorded))
    random.Random(resolved.manifest.seed).shuffle(conversations)
    template = gguf_template(resolved)
    texts, tokens = [], 0
    for conversation in conversations:
        for sample in template.encode_conversation(conversation):
            texts.append(template.tokenizer.decode(sample.ids.tolist()))
            tokens += len(sample.ids)
        if tokens > 1.1 * PIECE * PIECES:
            break
    # Beside the models, but not among them: every *.gguf there is taken for one.
    output = source.parent / "imatrix" / f"{source.stem}.gguf"
    return make_imatrix(source, "\n".join(texts), tokens, output).path


def _training_conversations(resolved: Any, data: DataSettings) -> list[Conversation]:
    if data.dataset is None:
        raise UserError(f"{resolved.folder.path} does not say what it was trained on: quantise without --imatrix.")
    pack = domain_pack(resolved, None)
    load: Any = load_pairs if resolved.manifest.command == "dpo" else load_conversations
    items, _, _ = training_data(
        data,
        load,
        seed=resolved.manifest.seed,
        system=system_prompt(resolved, None, None),
        normalizer=TermNormalizer(pack) if pack else None,
    )
    return [
        item if isinstance(item, Conversation) else Conversation((*item.prompt, item.chosen), item.source)
        for item in items
    ]
