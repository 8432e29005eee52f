"""One model that answers one request at a time, in the order in which they came."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.inference.server.requests import Job, RequestError
from unsloth_factory.inference.stream import StreamEvent, TextAssembler, decoder_of, events

TokenStream = Callable[[list[int], int, Sampling], Iterator[int]]
"""(prompt ids, most new tokens, sampling) -> tokens of the answer, without the stop token."""
LOOK_SECONDS = 0.5
"""How often a waiting request looks whether its client is still there."""


class Usage(NamedTuple):
    """Tokens of one answer."""

    prompt: int
    completion: int


class Ending(NamedTuple):
    """How an answer ended."""

    reason: Literal["stop", "length"]
    usage: Usage


class Queue:
    """First come, first served, one at a time.

    Args:
        most_waiting: Requests that may wait; one more is sent away.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most, self._line, self._changed = most_waiting, deque[object](), threading.Condition()
        self._closed = False

    @contextmanager
    def turn(self, gone: Callable[[], bool]) -> Iterator[None]:
        """Wait for one's turn and hold it.

        Args:
            gone: Whether the client has left; a request that nobody waits for gives its place up.

        Raises:
            RequestError: Too many wait, or the server stops.
            ConnectionError: The client has left.
        """
        ticket = object()
        with self._changed:
            if len(self._line) > self._most:
                raise RequestError(503, f"{self._most} requests wait already. Try later.", kind="server_error")
            self._line.append(ticket)
        try:
            with self._changed:
                while self._line[0] is not ticket and not self._closed:
                    self._changed.wait(LOOK_SECONDS)
                    if gone():
                        raise ConnectionResetError("the client left while it waited")
                if self._closed:
                    raise RequestError(503, "The server is stopping.", kind="server_error")
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def close(self, seconds: float) -> bool:
        """Send all away who wait, and wait for the one who is served; false when it takes longer than `seconds`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._line, seconds)

    @property
    def closed(self) -> bool:
        """The server stops: whoever is served ends at the next token."""
        return self._closed


class StopStrings:
    """Text in, text up to the first stop string out; what may be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops, self._held, self.hit = stops, "", False

    def push(self, text: str) -> str:
        """The text that can be shown; `hit` is set once a stop string has come."""
        if self.hit:
            return ""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.hit, shown, self._held = True, self._held[: min(found)], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def finish(self) -> str:
        """What was held back: the answer ended before it became a stop string."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True)
class Engine:
    """A model with its chat template."""

    template: ChatTemplate
    tokens: TokenStream
    max_positions: int

    def prompt(self, job: Job) -> list[int]:
        """Token ids of the job's prompt.

        Raises:
            RequestError: It leaves no room for an answer, or has ids that are none.
            UserError: The chat template refuses the turns.
        """
        if job.is_chat:
            ids = self.template.encode_prompt(job.turns, job.thinking)
        else:
            ids = list(job.ids) or list(self.template.tokenizer.encode(job.text))
        if job.ids and max(ids) >= len(self.template.tokenizer):
            raise RequestError(400, f"prompt: token {max(ids)} is not in the vocabulary.", parameter="prompt")
        if len(ids) >= self.max_positions:
            raise RequestError(
                400,
                f"The prompt has {len(ids)} tokens; the model's context of {self.max_positions} has no room for an "
                "answer.",
                parameter="messages" if job.is_chat else "prompt",
                code="context_length_exceeded",
            )
        return ids

    def answer(
        self, job: Job, prompt: list[int], stopped: Callable[[], bool]
    ) -> Generator[StreamEvent | Ending, None, None]:
        """Pieces of text as they come, and at last how it ended. Only for who has the turn.

        Args:
            job: What is asked.
            prompt: As `prompt` gives it.
            stopped: Asked before each token; true breaks the answer off (ConnectionError).
        """
        limit = min(job.max_new_tokens, self.max_positions - len(prompt))
        made = 0

        def counted() -> Generator[int, None, None]:
            nonlocal made
            with closing(self.tokens(prompt, limit, job.sampling)) as tokens:  # type: ignore[type-var]
                for token in tokens:
                    if stopped():
                        raise ConnectionAbortedError("nobody waits for the answer")
                    made += 1
                    yield token

        stops = StopStrings(job.stops)
        with closing(counted()) as tokens, closing(self._texts(job, tokens)) as texts:
            for event in texts:
                # Reasoning is not searched: a stop string is meant for the answer.
                shown = stops.push(event.text) if event.kind == "answer" else event.text
                if shown:
                    yield StreamEvent(event.kind, shown)
                if stops.hit:
                    break
        if held := stops.finish():
            yield StreamEvent("answer", held)
        yield Ending("stop" if stops.hit or made < limit else "length", Usage(len(prompt), made))

    def _texts(self, job: Job, tokens: Iterator[int]) -> Generator[StreamEvent, None, None]:
        """A chat's answer with its thinking apart; a completion's text as it is."""
        decode = decoder_of(self.template.tokenizer)
        if job.is_chat:
            yield from events(tokens, decode, self.template.opens_thinking(job.thinking))
            return
        assembler = TextAssembler(decode)
        for token in tokens:
            yield StreamEvent("answer", assembler.push(token))
        yield StreamEvent("answer", assembler.finish())
