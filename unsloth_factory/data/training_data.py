"""Both sides of a training: rows loaded, repeats found, samples held out, leaks between the sides found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import DataSettings
from unsloth_factory.data.duplicates import Duplicates, Group, find_duplicates
from unsloth_factory.data.leakage import find_leaks
from unsloth_factory.data.load import Normalizer
from unsloth_factory.data.split import split_validation
from unsloth_factory.data.types import LISTED, Conversation, DataReport, PreferencePair

_SHOWN = 3
_Item = TypeVar("_Item", Conversation, PreferencePair)


def training_data(
    settings: DataSettings,
    load: Callable[..., tuple[list[_Item], DataReport]],
    *,
    seed: int,
    system: str | None = None,
    normalizer: Normalizer | None = None,
) -> tuple[list[_Item], list[_Item], DataReport]:
    """(training items, held-out items, report).

    Args:
        settings: Files, the split, and the policies on bad, repeated and leaking rows.
        load: `load_conversations` or `load_pairs`.
        seed: Of the split.
        system: System prompt for rows that have none of their own.
        normalizer: Applied to the user's and the assistant's text.

    Raises:
        UserError: A file cannot be used; nothing is left to train on; or --leakage refuse met a leak.
    """
    items: list[_Item]
    given: list[_Item] = []
    items, report = load(settings, system=system, normalizer=normalizer)
    if settings.eval_dataset is not None:
        own = replace(settings, dataset=settings.eval_dataset, data_limit=None)
        given, held_report = load(own, system=system, normalizer=normalizer)
        _add_held_out(report, held_report)
    duplicates = find_duplicates([*items, *given])
    groups = dict(zip(map(id, [*items, *given]), duplicates.groups(), strict=True))
    kept = _without_repeats(items, duplicates, settings, report)
    if settings.eval_dataset is None:
        near = [groups[id(item)].near for item in kept]
        train, held_out = split_validation(kept, settings.val_split, seed, near)
    else:
        train, held_out = kept, given
    train = _without_leaks(train, held_out, groups, settings, report)
    report.used = len(train) + (len(held_out) if settings.eval_dataset is None else 0)
    return train, held_out, report


def _add_held_out(report: DataReport, held_report: DataReport) -> None:
    """What happened to the rows of --eval_dataset."""
    report.files += held_report.files
    room = LISTED - len(report.skipped_examples)
    report.skipped_examples += held_report.skipped_examples[:room]
    for what, count in held_report.skipped.items():
        report.notes[f"held-out rows left out: {what}"] = count


def _without_repeats(
    items: list[_Item], duplicates: Duplicates, settings: DataSettings, report: DataReport
) -> list[_Item]:
    """The training items that the policy on repeats keeps, in their order."""
    dropped: set[int] = set()
    for kind, found, drops in (
        ("exact duplicates", duplicates.exact, settings.duplicates != "keep"),
        ("near duplicates", duplicates.near, settings.duplicates == "drop_near"),
    ):
        # Rows of the held-out file come last, so that a training row never repeats one of them.
        repeats = {row: earlier for row, earlier in found.items() if row < len(items)}
        if not repeats:
            continue
        sign = "=" if kind.startswith("exact") else "~"
        room = LISTED - len(report.duplicates)
        named = [f"{items[row].source} {sign} {items[earlier].source}" for row, earlier in repeats.items()]
        report.duplicates += named[:room]
        report.notes[f"{kind} ({'dropped' if drops else 'kept'})"] = len(repeats)
        dropped |= repeats.keys() if drops else set()
    return [item for number, item in enumerate(items) if number not in dropped]


def _without_leaks(
    train: list[_Item],
    held_out: list[_Item],
    groups: dict[int, Group],
    settings: DataSettings,
    report: DataReport,
) -> list[_Item]:
    """The training items that the policy on leaks keeps.

    Raises:
        UserError: --leakage refuse, and there is a leak; or drop leaves nothing.
    """
    leaks = find_leaks(train, held_out, [groups[id(item)] for item in [*train, *held_out]])
    if not leaks.worst:
        return train
    lines = [leak.describe(train, held_out) for leak in leaks.worst]
    report.leaks = lines[:LISTED]
    counted = f"held-out samples given away by {len(leaks.train):,} training rows"
    if settings.leakage == "refuse":
        raise UserError(
            f"{len(lines):,} of {len(held_out):,} {counted}: {_first(lines)}. "
            "Mend the data, or leave these training rows out with --leakage drop."
        )
    drops = settings.leakage == "drop"
    report.notes[f"{counted} ({'dropped' if drops else 'kept'})"] = len(lines)
    kept = [item for number, item in enumerate(train) if number not in leaks.train] if drops else train
    if not kept:
        raise UserError(
            f"--leakage drop leaves no sample to train on: every row is held out as well ({_first(lines)}). "
            "Give other evaluation data."
        )
    return kept


def _first(lines: Sequence[Any]) -> str:
    more = f"; and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return "; ".join(map(str, lines[:_SHOWN])) + more
