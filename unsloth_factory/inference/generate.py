"""Batched generation: results in the order of the prompts, whatever order they are computed in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.decoder import Decoder, evaluating
from unsloth_factory.inference.sampling import GREEDY, Sampling, choose, row_streams
from unsloth_factory.inference.thinking import ThinkingBudget
from unsloth_factory.inference.workers import run_batches
from unsloth_factory.model.loaded import LoadedModel

AT_ONCE = 8
"""Answers computed together where nothing else is asked for."""
Progress = Callable[[int, int], None]
"""Called with (done, total) as work is finished."""


@dataclass(frozen=True)
class Generation:
    """One answer. `ids` are its tokens without the stop token; `stopped` is false when the limit cut it off."""

    ids: list[int]
    stopped: bool


def length_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, so that padding is small and memory peaks at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def generate(
    loaded: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int = AT_ONCE,
    on_progress: Progress | None = None,
    thinking: ThinkingBudget | None = None,
) -> list[Generation]:
    """Answer every prompt.

    Args:
        loaded: The model (within `loaded.adapter_disabled()` it answers as the base).
        prompts: Token ids, each ending where the answer begins.
        stop_ids: Tokens that end an answer.
        max_new_tokens: Longest answer, tokens; less where the model's context ends earlier.
        sampling: Greedy by default.
        batch_size: Answers computed together; a CPU works on several batches at a time (`workers.py`).
        on_progress: Called with (answers done, all).
        thinking: Closes the thinking of an answer that goes on beyond it; `max_new_tokens` are then for what follows.

    Raises:
        UserError: A prompt leaves no room for an answer in the model's context.
    """
    longest = max_new_tokens + (thinking.tokens + len(thinking.closing_ids) if thinking else 0)
    budgets = [_budget(loaded, prompt, longest) for prompt in prompts]
    results: dict[int, Generation] = {}
    with evaluating(loaded):

        def answer(batch: list[int], stopped: threading.Event) -> dict[int, Generation]:
            answers = _Answers(batch, [budgets[row] for row in batch], frozenset(stop_ids), thinking)
            _run_batch(loaded, [prompts[row] for row in batch], answers, sampling, stopped)
            return answers.finished

        batches = length_batches([len(prompt) for prompt in prompts], batch_size)
        for _, finished in run_batches(loaded, batches, answer):
            results |= finished
            if on_progress:
                on_progress(len(results), len(prompts))
    return [results[row] for row in range(len(prompts))]


def stream_tokens(
    loaded: LoadedModel,
    prompt: list[int],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[int]:
    """The tokens of one answer as they are computed, without the stop token."""
    streams = row_streams(sampling, [0])
    remaining = _budget(loaded, prompt, max_new_tokens)
    with evaluating(loaded):
        decoder = Decoder(loaded, [prompt])
        while True:
            token = choose(decoder.logits, sampling, streams)[0]
            if token in stop_ids:
                return
            yield token
            remaining -= 1
            if remaining == 0:
                return
            decoder.feed([token])


def _budget(loaded: LoadedModel, prompt: Sequence[int], max_new_tokens: int) -> int:
    if not prompt:
        raise UserError("The prompt is empty: there is nothing to answer.")
    room = loaded.max_positions - len(prompt)
    if room < 1:
        raise UserError(
            f"A prompt of {len(prompt)} tokens fills the model's context of {loaded.max_positions}. Shorten it."
        )
    return min(room, max_new_tokens)


class _Answers:
    """Which rows of one batch still grow, and what they have grown to."""

    def __init__(
        self,
        rows: Sequence[int],
        budgets: Sequence[int],
        stop_ids: frozenset[int],
        thinking: ThinkingBudget | None = None,
    ) -> None:
        self.rows = list(rows)
        self.finished: dict[int, Generation] = {}
        self._budgets = dict(zip(rows, budgets, strict=True))
        self._ids: dict[int, list[int]] = {row: [] for row in rows}
        self._stop_ids = stop_ids
        self._thinking = thinking
        self._forced: dict[int, list[int]] = {}

    def forced(self, tokens: Sequence[int]) -> list[int]:
        """The tokens, with those that end the thinking of a row whose budget is used up in the place of its own."""
        if self._thinking is None:
            return list(tokens)
        for row in self.rows:
            ids = self._ids[row]
            if row not in self.finished and len(ids) == self._thinking.tokens and self._thinking.is_thinking(ids):
                self._forced[row] = list(self._thinking.closing_ids)
        return [
            self._forced[row].pop(0) if self._forced.get(row) else token
            for row, token in zip(self.rows, tokens, strict=True)
        ]

    def add(self, tokens: Sequence[int]) -> None:
        """Take the newest token of each computed row; a finished row's is ignored."""
        for row, token in zip(self.rows, tokens, strict=True):
            if row in self.finished:
                continue
            if token in self._stop_ids:
                self.finished[row] = Generation(self._ids[row], stopped=True)
                continue
            self._ids[row].append(token)
            if len(self._ids[row]) == self._budgets[row]:
                self.finished[row] = Generation(self._ids[row], stopped=False)

    def open_slots(self) -> list[int]:
        """Indices into `rows` of those that still grow."""
        return [slot for slot, row in enumerate(self.rows) if row not in self.finished]


def _run_batch(
    loaded: LoadedModel,
    prompts: list[list[int]],
    answers: _Answers,
    sampling: Sampling,
    stopped: threading.Event,
) -> None:
    streams = row_streams(sampling, answers.rows)
    decoder = Decoder(loaded, prompts)
    while not stopped.is_set():
        tokens = answers.forced(choose(decoder.logits, sampling, streams))
        answers.add(tokens)
        slots = answers.open_slots()
        if not slots:
            return
        # Copying the cache costs about one step: worth it once half of the rows have nothing to say any more.
        if len(slots) <= len(answers.rows) // 2:
            decoder.keep(slots)
            answers.rows = [answers.rows[slot] for slot in slots]
            streams = [streams[slot] for slot in slots]
            tokens = [tokens[slot] for slot in slots]
        decoder.feed(tokens)
