"""Put requests to a judge: the cache first, a probe that tells the cost of the rest, one retry of what says nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.evaluation.judge.cache import ReplyCache
from unsloth_factory.evaluation.judge.prompts import reminder
from unsloth_factory.inference.endpoint import EndpointDown, Message, Reply
from unsloth_factory.inference.generate import Progress

FAILURES_IN_A_ROW = 5
"""Requests in a row that fail for good before the judging is given up."""


class Judge(Protocol):
    """A model that answers conversations."""

    name: str
    at_a_time: int
    """Requests under way together."""

    def ask(self, prompts: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply | Exception]]:
        """(index, reply or what went wrong) of each prompt, as they come."""


@dataclass(frozen=True)
class Request:
    """A prompt, and what reads the reply: the value, or None where it says nothing plain."""

    messages: Sequence[Message]
    read: Callable[[str], Any]


@dataclass(frozen=True)
class Estimate:
    """What the requests that are still open will take, from the first of them."""

    requests: int
    cached: int
    prompt_tokens: int
    """0 where the judge does not count tokens."""
    completion_tokens: int
    seconds: float


@dataclass
class Answers:
    """What came of the requests."""

    values: list[Any] = field(default_factory=list)
    """One a request; None where the judge failed or could not be read."""
    replies: list[str] = field(default_factory=list)
    """The judge's words, "" where it failed."""
    asked: int = 0
    cached: int = 0
    retried: int = 0
    """Unreadable replies that were asked for once more."""
    unreadable: int = 0
    """Requests without a plain reply after that."""
    cut_off: int = 0
    """Of these, replies that the limit of tokens cut off."""
    failed: int = 0
    """Requests that the judge did not answer at all."""
    first_failure: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Asking:
    """One judging: the cache, what may still be asked, and what has gone wrong."""

    def __init__(self, judge: Judge, cache: ReplyCache, limit: int, on_progress: Progress | None) -> None:
        self.judge, self.cache, self.left, self.on_progress = judge, cache, limit, on_progress
        self.answers = Answers()
        self._in_a_row = 0

    def ask(self, prompts: dict[str, Sequence[Message]], done: int, total: int) -> None:
        """Ask for what the cache does not have; key -> prompt. Failures are counted."""
        keys = list(prompts)
        for index, reply in self.judge.ask([prompts[key] for key in keys]):
            self.answers.asked += 1
            self.left -= 1
            if isinstance(reply, Exception):
                self._failed(reply)
            else:
                self._in_a_row = 0
                self.cache.put(keys[index], reply)
                self.answers.prompt_tokens += reply.prompt_tokens
                self.answers.completion_tokens += reply.completion_tokens
            done += 1
            if self.on_progress:
                self.on_progress(done, total)

    def _failed(self, error: Exception) -> None:
        if isinstance(error, EndpointDown) or not isinstance(error, UserError):
            raise error
        self.answers.failed += 1
        self.answers.first_failure = self.answers.first_failure or str(error)
        self._in_a_row += 1
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise UserError(
                f"The judge failed {self._in_a_row} times in a row: {error} Its replies so far are kept: the same "
                "command goes on from there."
            )


def ask_judge(
    judge: Judge,
    requests: Sequence[Request],
    cache: ReplyCache,
    *,
    max_requests: int,
    on_estimate: Callable[[Estimate], None] | None = None,
    on_progress: Progress | None = None,
) -> Answers:
    """Answer every request, from the cache where it is known there.

    Args:
        judge: Who is asked.
        requests: Prompts and readers; equal prompts are asked once.
        cache: Kept replies.
        max_requests: Most requests that the judge may get, retries included.
        on_estimate: Called once the first new reply tells what the rest will take.
        on_progress: Called with (replies, all that were to be asked).

    Raises:
        UsageError: More requests are open than `max_requests`; none was asked.
        UserError: The judge cannot be reached, or failed several times in a row.
    """
    keys = [cache.key(request.messages) for request in requests]
    prompts = dict(zip(keys, (request.messages for request in requests), strict=True))
    missing = {key: messages for key, messages in prompts.items() if cache.get(key) is None}
    if len(missing) > max_requests:
        raise UsageError(
            f"--judge_max_requests {max_requests}: {len(missing)} requests are needed ({len(prompts) - len(missing)} "
            "more are in the cache). Raise it, or judge less: --max_samples, --judge_mode."
        )
    asking = _Asking(judge, cache, max_requests, on_progress)
    asking.answers.cached = len(prompts) - len(missing)
    if missing:
        probe = next(iter(missing))
        asking.ask({probe: missing[probe]}, 0, len(missing))
        reply = cache.get(probe)
        if on_estimate and reply:
            on_estimate(_estimate(missing, probe, reply, judge, asking.answers.cached))
        asking.ask({key: messages for key, messages in missing.items() if key != probe}, 1, len(missing))
    _read(asking, requests, keys)
    return asking.answers


def _estimate(missing: dict[str, Sequence[Message]], probe: str, reply: Reply, judge: Judge, cached: int) -> Estimate:
    """The probe's tokens a character and seconds, over all open prompts."""
    lengths = {key: sum(len(message["content"]) for message in messages) for key, messages in missing.items()}
    rest = len(missing) - 1
    return Estimate(
        requests=len(missing),
        cached=cached,
        prompt_tokens=round(reply.prompt_tokens * sum(lengths.values()) / max(1, lengths[probe])),
        completion_tokens=reply.completion_tokens * len(missing),
        seconds=reply.seconds * rest / max(1, min(judge.at_a_time, rest)),
    )


def _read(asking: _Asking, requests: Sequence[Request], keys: Sequence[str]) -> None:
    """Read the replies; those that cannot be read are asked for once more."""
    cache, answers = asking.cache, asking.answers
    again: dict[str, tuple[str, Sequence[Message]]] = {}
    for request, key in zip(requests, keys, strict=True):
        reply = cache.get(key)
        if reply is not None and request.read(reply.text) is None and key not in again:
            messages = reminder(request.messages, reply.text)
            again[key] = (cache.key(messages), messages)
    answers.retried = len(again)
    open_again = {second: messages for second, messages in again.values() if cache.get(second) is None}
    allowed = dict(list(open_again.items())[: max(0, asking.left)])
    if allowed:
        asking.ask(allowed, 0, len(allowed))
    for request, key in zip(requests, keys, strict=True):
        reply = cache.get(key)
        value = None if reply is None else request.read(reply.text)
        if value is None and key in again:
            reply = cache.get(again[key][0]) or reply
            value = None if reply is None else request.read(reply.text)
        answers.unreadable += reply is not None and value is None
        answers.cut_off += reply is not None and value is None and not reply.finished
        answers.values.append(value)
        answers.replies.append(reply.text if reply else "")
