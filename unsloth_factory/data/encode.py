"""Conversations and preference pairs to token rows that fit the sequence length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import LongSamples
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import LISTED, Conversation, DataReport, PreferencePair, TokenPair, TokenSample, Turn

if TYPE_CHECKING:
    from rich.text import Text

# Rows handed to the tokenizer at once: large enough to hide the call, small enough to keep texts out of memory.
CHUNK = 256
GAP = " … "
# A question cut to less than this many characters says nothing: the row is dropped instead.
MIN_QUESTION = 8
# No text has more on average (English 4 to 5): what is longer than so many times the limit is cut before it is encoded.
CHARACTERS_PER_TOKEN = 16
_Item = TypeVar("_Item")
_Row = TypeVar("_Row", bound=TokenSample | TokenPair)


def encode_samples(
    conversations: Sequence[Conversation],
    template: ChatTemplate,
    max_seq_length: int,
    long_samples: LongSamples = "shorten_prompt",
    report: DataReport | None = None,
) -> list[TokenSample]:
    """Token rows of all conversations, none longer than `max_seq_length` tokens.

    Args:
        conversations: What is trained on.
        template: Renders and encodes.
        max_seq_length: Longest row, tokens.
        long_samples: "drop" leaves longer rows out; "shorten_prompt" cuts their prompt, never the answer: the oldest
            turns go first, then the middle of the longest user text.
        report: Gets the counts and the token statistics.

    Raises:
        UserError: A row has no trained token, or no row is left.
    """
    report = report if report is not None else DataReport()
    samples: list[TokenSample] = []
    for part in _chunks(conversations):
        for conversation, rows in zip(part, template.encode_conversations(part), strict=True):
            if max((len(row.ids) for row in rows), default=0) > max_seq_length:
                rows = _fit(conversation, rows, template, max_seq_length, long_samples, report)
            for row in rows:
                _require_trained(row)
            samples += rows
    _finish(report, samples, len(conversations), max_seq_length)
    return samples


def encode_pairs(
    pairs: Sequence[PreferencePair],
    template: ChatTemplate,
    max_seq_length: int,
    long_samples: LongSamples = "shorten_prompt",
    report: DataReport | None = None,
) -> list[TokenPair]:
    """Token rows of all pairs; chosen and rejected keep the same prompt. Arguments and errors as `encode_samples`."""
    report = report if report is not None else DataReport()
    out: list[TokenPair] = []
    for part in _chunks(pairs):
        for pair, encoded in zip(part, template.encode_pairs(part), strict=True):
            if _length(encoded) > max_seq_length:
                shorter = _shorten_pair(pair, template, max_seq_length) if long_samples == "shorten_prompt" else None
                _count(report, shorter, pair.source, max_seq_length)
                if shorter is None:
                    continue
                encoded = shorter
            _require_trained(encoded.chosen)
            _require_trained(encoded.rejected)
            out.append(encoded)
    rows = [row for pair in out for row in (pair.chosen, pair.rejected)]
    _finish(report, rows, len(pairs), max_seq_length)
    return out


def describe_sample(template: ChatTemplate, sample: TokenSample) -> Text:
    """The rendered sample; the trained part is bold green and stands between ⟦ and ⟧."""
    from rich.text import Text

    text = Text()
    edges = np.flatnonzero(np.diff(sample.trained)) + 1
    for ids, flags in zip(np.split(sample.ids, edges), np.split(sample.trained, edges), strict=True):
        piece = template.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        text.append(f"⟦{piece}⟧" if flags[0] else piece, style="bold green" if flags[0] else "dim")
    return text


def _chunks(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))


def _until_answer(turns: Sequence[Turn], number: int) -> tuple[Turn, ...]:
    """The turns up to and with the assistant turn `number`, counted from 0."""
    ends = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    return tuple(turns[: ends[number] + 1])


def _fit(
    conversation: Conversation,
    rows: Sequence[TokenSample],
    template: ChatTemplate,
    limit: int,
    long_samples: LongSamples,
    report: DataReport,
) -> list[TokenSample]:
    """The rows of one conversation with the long ones shortened, cut into windows, or left out."""
    if long_samples == "shorten_prompt" and len(rows) == 1:
        return _windows(conversation, template, limit, report)
    fitting = []
    for number, row in enumerate(rows):
        shorter: TokenSample | None = row
        if len(row.ids) > limit:
            shorter = None
            if long_samples == "shorten_prompt":
                *prompt, answer = _until_answer(conversation.turns, number)
                shorter, _ = _shorten(tuple(prompt), _answer_encoder(template, answer, conversation), limit)
            _count(report, shorter, conversation.source, limit)
        if shorter is not None:
            fitting.append(shorter)
    return fitting


def _answer_encoder(
    template: ChatTemplate, answer: Turn, conversation: Conversation
) -> Callable[[tuple[Turn, ...]], TokenSample]:
    return lambda prompt: template.encode_answer((*prompt, answer), conversation.source)


def _windows(conversation: Conversation, template: ChatTemplate, limit: int, report: DataReport) -> list[TokenSample]:
    """A conversation that is one row, as rows of as many last turns as fit: every answer is still trained once."""
    windows: list[TokenSample] = []
    turns = _until_answer(conversation.turns, -1)
    opening = 1 if turns[0].role == "system" else 0
    while len(turns) > opening:

        def encode(prompt: tuple[Turn, ...], last: Turn = turns[-1]) -> TokenSample:
            return template.encode_conversation(replace(conversation, turns=(*prompt, last)))[-1]

        row: TokenSample | None = encode(turns[:-1])
        start = opening
        if row is not None and len(row.ids) > limit:
            row, start = _shorten(turns[:-1], encode, limit)
            _count(report, row, conversation.source, limit)
        if row is not None:
            windows.insert(0, row)
        turns = turns[:start]
    return windows


def _shorten_pair(pair: PreferencePair, template: ChatTemplate, limit: int) -> TokenPair | None:
    def encode(prompt: tuple[Turn, ...]) -> TokenPair:
        return template.encode_pair(replace(pair, prompt=prompt))

    return _shorten(pair.prompt, encode, limit)[0]


def _shorten(
    prompt: tuple[Turn, ...],
    encode: Callable[[tuple[Turn, ...]], _Row],
    limit: int,
) -> tuple[_Row | None, int]:
    """The row with the longest prompt that fits and where that begins in `prompt`.

    None when even a few characters of the last question do not fit beside the answer.
    """
    system = tuple(turn for turn in prompt[:1] if turn.role == "system")
    starts = [i for i, turn in enumerate(prompt) if turn.role == "user"]
    best, later = None, starts[1:]
    low, high = 0, len(later)
    # Bisected: rows only get shorter with a later start.
    while low < high:
        middle = (low + high) // 2
        row = encode((*system, *prompt[later[middle] :]))
        if _length(row) <= limit:
            best, high = row, middle
        else:
            low = middle + 1
    if best is not None:
        return best, later[low]
    kept = (*system, *prompt[starts[-1] :])
    texts = [i for i, turn in enumerate(kept) if turn.role in ("user", "tool")]
    longest = max(texts, key=lambda i: len(kept[i].content))
    content = kept[longest].content

    def cut(characters: int) -> _Row:
        turn = replace(kept[longest], content=_without_middle(content, characters))
        return encode((*kept[:longest], turn, *kept[longest + 1 :]))

    return _largest_fit(cut, min(len(content) - 1, CHARACTERS_PER_TOKEN * limit), limit), starts[-1]


def _largest_fit(cut: Callable[[int], _Row], most: int, limit: int) -> _Row | None:
    """Bisect the number of characters kept, to within 1/64 of `most`."""
    best = None
    low, high = min(MIN_QUESTION, most), most
    step = max(1, most // 64)
    while low <= high:
        middle = (low + high) // 2
        row = cut(middle)
        if _length(row) <= limit:
            best, low = row, middle + step
        else:
            high = middle - step
    return best


def _without_middle(text: str, characters: int) -> str:
    """The first and last halves of what is kept: questions carry their point at either end."""
    head = (characters + 1) // 2
    tail = characters - head
    return text[:head] + GAP + (text[-tail:] if tail else "")


def _length(row: TokenSample | TokenPair) -> int:
    return len(row.ids) if isinstance(row, TokenSample) else max(len(row.chosen.ids), len(row.rejected.ids))


def _count(report: DataReport, shorter: object | None, source: str, limit: int) -> None:
    if shorter is not None:
        report.shortened += 1
        return
    report.dropped_too_long += 1
    if len(report.skipped_examples) < LISTED:
        report.skipped_examples.append(f"{source} longer than {limit} tokens")


def _require_trained(sample: TokenSample) -> None:
    if not sample.trained.any():
        raise UserError(f"{sample.source}: no token of this row would be trained. Remove the row or fill its answer.")


def _finish(report: DataReport, samples: Sequence[TokenSample], given: int, limit: int) -> None:
    if not samples:
        raise UserError(
            f"No sample is left of {given}: all are longer than --max_seq_length {limit}. "
            "Raise it, or keep --long_samples shorten_prompt, which cuts prompts but not answers. "
            f"Such as: {'; '.join(report.skipped_examples[-3:])}."
            if given
            else "There is no sample to train on."
        )
    lengths = np.array([len(sample.ids) for sample in samples])
    trained = int(sum(int(sample.trained.sum()) for sample in samples))
    report.tokens = {
        "total": int(lengths.sum()),
        "trained": trained,
        "trained_share": round(trained / int(lengths.sum()), 4),
        "mean": round(float(lengths.mean()), 1),
        "p50": float(np.percentile(lengths, 50)),
        "p95": float(np.percentile(lengths, 95)),
        "max": int(lengths.max()),
    }
