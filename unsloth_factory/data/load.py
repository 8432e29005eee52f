"""Data settings to conversations or preference pairs, with a report of what happened to every row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import DataSettings
from unsloth_factory.data.formats import BY_NAME, Parsed, RowProblem, Shape, find_shape, named_shape
from unsloth_factory.data.readers import Table, read_table
from unsloth_factory.data.sources import Source, resolve
from unsloth_factory.data.types import LISTED, Conversation, DataReport, PreferencePair, Turn

MAX_CHARACTERS = 1_000_000
"""Longest row: a quarter of a million tokens at least, more than any sequence length, and two seconds to encode."""
_SHOWN_ROWS = 5
# Columns of LLaMA-Factory's registry that carry nothing for these methods; media columns are checked by the shapes.
_IGNORED_ROLES = frozenset({"tools", "kto_tag"})
_MEDIA_ROLES = frozenset({"images", "videos", "audios"})
_Item = TypeVar("_Item", Conversation, PreferencePair)


class Normalizer(Protocol):
    """knowledge.TermNormalizer: replaces variants of a term by its canonical form."""

    def normalize(self, text: str) -> tuple[str, int]:
        """(text, replacements)."""
        ...


def load_conversations(
    settings: DataSettings, *, system: str | None = None, normalizer: Normalizer | None = None
) -> tuple[list[Conversation], DataReport]:
    """Conversations of --dataset.

    Args:
        settings: Which files, and how they are read.
        system: System prompt for rows that have none of their own.
        normalizer: Applied to the user's and the assistant's text.

    Raises:
        UserError: A file is missing or damaged, its columns make no conversation, or more than half of its rows
            cannot be used.
    """
    return _load(settings, False, lambda parsed, source: Conversation(parsed.turns, source), system, normalizer)


def load_pairs(
    settings: DataSettings, *, system: str | None = None, normalizer: Normalizer | None = None
) -> tuple[list[PreferencePair], DataReport]:
    """Preference pairs of --dataset; arguments and errors as `load_conversations`."""

    def build(parsed: Parsed, source: str) -> PreferencePair:
        assert parsed.chosen is not None
        assert parsed.rejected is not None
        return PreferencePair(parsed.turns, parsed.chosen, parsed.rejected, source)

    return _load(settings, True, build, system, normalizer)


def _load(
    settings: DataSettings,
    preference: bool,
    build: Callable[[Parsed, str], _Item],
    system: str | None,
    normalizer: Normalizer | None,
) -> tuple[list[_Item], DataReport]:
    if settings.dataset_format != "auto":
        named_shape(settings.dataset_format)
    report = DataReport()

    def make(parsed: Parsed, source: str) -> _Item:
        return build(_prepare(parsed, system, normalizer, report), source)

    items: list[_Item] = []
    for source in resolve(settings):
        room = None if settings.data_limit is None else settings.data_limit - len(items)
        if room == 0:
            break
        items += _load_file(source, preference, make, settings, room, report)
    report.used = len(items)
    return items, report


def _load_file(
    source: Source,
    preference: bool,
    build: Callable[[Parsed, str], _Item],
    settings: DataSettings,
    room: int | None,
    report: DataReport,
) -> list[_Item]:
    table = read_table(source.path, settings.encoding, skip_broken=settings.bad_rows == "skip")
    shape = _choose_shape(source, table, preference)
    rename = _renaming(source, shape, table)
    items: list[_Item] = []
    problems: list[tuple[str, str]] = []
    seen = 0
    for row in table.rows[: source.limit]:
        if room is not None and len(items) == room:
            break
        seen += 1
        where = f"{source.path.name}:{row.number}"
        try:
            if row.values is None:
                raise RowProblem(row.problem or "unreadable")
            parsed = shape.parse(rename(row.values), source.tags)
            _check_texts(parsed)
            _look_at(parsed, settings, report)
        except RowProblem as problem:
            problems.append((where, str(problem)))
            continue
        items.append(build(parsed, where))
    report.rows += seen
    report.files.append(
        {"path": str(source.path), "encoding": table.encoding, "format": f"{table.kind}/{shape.name}", "rows": seen}
        | {"used": len(items)}
    )
    _record_problems(report, problems)
    _refuse_mostly_bad(source, shape, table, len(items), problems)
    if problems and settings.bad_rows == "refuse":
        raise UserError(
            f"{source.path}: {len(problems)} of {seen} rows cannot be used ({_listed_rows(problems)}). "
            "Mend them, or leave them out with --bad_rows skip."
        )
    return items


def _check_texts(parsed: Parsed) -> None:
    """Refuse what no tokenizer and no file can hold, whichever reader it came through.

    Raises:
        RowProblem: A NUL character, half of a surrogate pair, or more than MAX_CHARACTERS.
    """
    turns = [turn for turn in (*parsed.turns, parsed.chosen, parsed.rejected) if turn]
    texts = [text for turn in turns for text in (turn.content, turn.reasoning or "")]
    length = sum(map(len, texts))
    if length > MAX_CHARACTERS:
        raise RowProblem(f"more than {MAX_CHARACTERS:,} characters")
    for text in texts:
        if "\0" in text:
            raise RowProblem("a NUL character in the text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise RowProblem("half of a surrogate pair in the text") from None


def _look_at(parsed: Parsed, settings: DataSettings, report: DataReport) -> None:
    """Note what is odd about a usable row.

    Raises:
        RowProblem: The answer repeats the question, and the policy on bad rows is strict.
    """
    answer = parsed.chosen or parsed.turns[-1]
    question = parsed.turns[-1 if parsed.chosen else -2]
    if answer.content == question.content:
        if settings.bad_rows != "auto":
            raise RowProblem("answer equals question")
        _note(report, "answers equal to their question (kept)", 1)
    _note(report, "turns of the same role joined", parsed.merged)
    broken = any("\ufffd" in turn.content for turn in (*parsed.turns, answer))
    _note(report, "rows with U+FFFD, where an earlier program lost characters", int(broken))


def _choose_shape(source: Source, table: Table, preference: bool) -> Shape:
    if source.shape is not None:
        shape = named_shape(source.shape)
    elif source.columns:
        shape = _shape_of_roles(frozenset(source.columns))
    elif table.columns:
        shape = find_shape(table.columns, source.path)
    else:
        reasons = Counter(row.problem for row in table.rows).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise UserError(f"{source.path}: no row can be read ({listed}).")
    if shape.preference and not preference:
        raise UserError(
            f"{source.path} holds preferences (chosen, rejected), which train with dpo. "
            "For sft give conversations or questions and answers."
        )
    if preference and not shape.preference:
        raise UserError(
            f"{source.path}: preference pairs are needed, with columns chosen and rejected; "
            f"found {', '.join(table.columns)}, the {shape.name} shape. Name yours with "
            "--columns prompt=COLUMN,chosen=COLUMN,rejected=COLUMN."
        )
    return shape


def _shape_of_roles(roles: frozenset[str]) -> Shape:
    if roles & {"chosen", "rejected"}:
        return BY_NAME["preference"]
    if "messages" in roles:
        return BY_NAME["sharegpt"]
    return BY_NAME["qa" if "title" in roles else "alpaca"]


def _renaming(source: Source, shape: Shape, table: Table) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """A function from a row as read to one with the shape's own column names.

    Raises:
        UserError: An unknown role, or a column that the file does not have.
    """
    if not source.columns:
        return lambda values: {name.strip().lower(): value for name, value in values.items()}
    names: dict[str, str] = {}
    for role, column in source.columns.items():
        if role in _IGNORED_ROLES:
            continue
        if role not in shape.roles and role not in _MEDIA_ROLES:
            raise UserError(
                f"{source.path}: --columns {role}={column}: unknown role. "
                f"Known for {shape.name}: {', '.join(shape.roles)}."
            )
        if column not in table.columns:
            raise UserError(
                f"{source.path}: no column {column!r} (--columns {role}={column}). Found: {', '.join(table.columns)}."
            )
        names[column] = shape.roles.get(role, role)
    return lambda values: {name: values[column] for column, name in names.items() if column in values}


def _prepare(parsed: Parsed, system: str | None, normalizer: Normalizer | None, report: DataReport) -> Parsed:
    """The row with terms normalised, and with the domain's system prompt where it has none."""

    def normalized(turn: Turn) -> Turn:
        if normalizer is None or turn.role not in ("user", "assistant"):
            return turn
        content, count = normalizer.normalize(turn.content)
        reasoning, more = normalizer.normalize(turn.reasoning) if turn.reasoning else (turn.reasoning, 0)
        report.terms_normalized += count + more
        return replace(turn, content=content, reasoning=reasoning)

    turns = tuple(normalized(turn) for turn in parsed.turns)
    if system and turns[0].role != "system":
        turns = (Turn("system", system), *turns)
    chosen = normalized(parsed.chosen) if parsed.chosen else None
    rejected = normalized(parsed.rejected) if parsed.rejected else None
    return replace(parsed, turns=turns, chosen=chosen, rejected=rejected)


def _note(report: DataReport, what: str, count: int) -> None:
    if count:
        report.notes[what] = report.notes.get(what, 0) + count


def _record_problems(report: DataReport, problems: list[tuple[str, str]]) -> None:
    for _, reason in problems:
        report.skipped[reason] = report.skipped.get(reason, 0) + 1
    room = LISTED - len(report.skipped_examples)
    report.skipped_examples += [f"{where} {reason}" for where, reason in problems[:room]]


def _listed_rows(problems: list[tuple[str, str]]) -> str:
    more = f"; and {len(problems) - _SHOWN_ROWS} more" if len(problems) > _SHOWN_ROWS else ""
    return "; ".join(f"{where} {reason}" for where, reason in problems[:_SHOWN_ROWS]) + more


def _refuse_mostly_bad(source: Source, shape: Shape, table: Table, used: int, problems: list[tuple[str, str]]) -> None:
    if len(problems) <= used:
        return
    counts = Counter(reason for _, reason in problems).most_common(3)
    listed = "; ".join(f"{count} x {reason}" for reason, count in counts)
    raise UserError(
        f"{source.path}: {len(problems)} of {used + len(problems)} rows cannot be used as {shape.name} ({listed}; "
        f"the first is {problems[0][0]}). Columns found: {', '.join(table.columns)}. "
        "Mend the rows, give another --dataset_format, or name the columns: --columns prompt=COLUMN,response=COLUMN."
    )
