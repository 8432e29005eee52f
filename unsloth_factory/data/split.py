"""The held-out samples: chosen by seed, never on both sides, kept in the run folder."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.duplicates import content_key
from unsloth_factory.data.types import Conversation, PreferencePair, Turn
from unsloth_factory.run.atomic import write_text

_Item = TypeVar("_Item", Conversation, PreferencePair)


def split_validation(
    items: Sequence[_Item], val_split: float, seed: int, groups: Sequence[int] | None = None
) -> tuple[list[_Item], list[_Item]]:
    """(training items, held-out items), both in the given order.

    Args:
        items: All items.
        val_split: A share below 1, or a number of items; 0 holds out none.
        seed: The same items and seed give the same split.
        groups: Items with the same number stay together, so that none of a group is trained on and validated on.
            Default: exact duplicates.

    Raises:
        UserError: Nothing would be left to train on.
    """
    wanted = round(val_split * len(items)) if val_split < 1 else int(val_split)
    if 0 < val_split < 1 and len(items) > 1:
        wanted = max(1, wanted)
    if wanted >= len(items) > 0 and wanted > 0:
        raise UserError(
            f"--val_split {val_split} holds out {wanted} of {len(items)} samples and leaves none to train on."
        )
    together: dict[Hashable, list[int]] = {}
    for index, key in enumerate(groups if groups is not None else map(content_key, items)):
        together.setdefault(key, []).append(index)
    members = list(together.values())
    order = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed % 2**64, 0x5417]))).permutation(
        len(members)
    )
    held: set[int] = set()
    for group in order:
        # A group larger than what is still wanted would overshoot; a smaller one will come.
        if len(members[group]) <= wanted - len(held):
            held.update(members[group])
    train = [item for index, item in enumerate(items) if index not in held]
    return train, [items[index] for index in sorted(held)]


def write_validation_split(path: Path, items: Sequence[Conversation] | Sequence[PreferencePair]) -> None:
    """Write held-out items as JSON lines: {"messages": [...], "source": ...}, and chosen, rejected for pairs."""
    lines = []
    for item in items:
        if isinstance(item, Conversation):
            record: dict[str, Any] = {"messages": [_message(turn) for turn in item.turns]}
        else:
            record = {"messages": [_message(turn) for turn in item.prompt]}
            record |= {"chosen": _message(item.chosen), "rejected": _message(item.rejected)}
        lines.append(json.dumps(record | {"source": item.source}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_validation_split(path: Path) -> list[Conversation]:
    """Conversations of `write_validation_split`; those of a pair end with the chosen answer.

    Raises:
        UserError: The file is missing or was changed by hand into something else.
    """
    if not path.is_file():
        raise UserError(f"{path}: the run has no held-out samples. Give some with --dataset.")
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            messages = record["messages"] + ([record["chosen"]] if "chosen" in record else [])
            turns = tuple(Turn(m["role"], m["content"], m.get("reasoning_content")) for m in messages)
            conversations.append(Conversation(turns, record["source"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} line {number}: not a held-out sample ({error!r}). Train again.") from None
    return conversations


def _message(turn: Turn) -> dict[str, str]:
    fields = asdict(turn)
    reasoning = fields.pop("reasoning")
    return fields | ({"reasoning_content": reasoning} if reasoning else {})
