"""A conversation with memory: what the model is shown, what is remembered, what is dropped when the context is full."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.stream import StreamEvent


class PromptEncoder(Protocol):
    """What a session asks of a chat template."""

    def encode_prompt(self, turns: tuple[Turn, ...], thinking: bool | None) -> list[int]:
        """Token ids of the turns, ending where the answer begins."""


AnswerStream = Callable[[list[int]], Iterator[StreamEvent]]
"""Prompt ids -> the answer as events; a model, a GGUF file or a test's stand-in."""


@dataclass
class ChatSession:
    """History, system prompt and thinking mode of one chat.

    The history keeps answers without their reasoning: the template renders earlier turns that way, and so the model
    was trained.
    """

    template: PromptEncoder
    answer_stream: AnswerStream
    max_prompt_tokens: int
    """Longest prompt that leaves room for an answer."""
    system: str | None = None
    thinking: bool | None = None
    keep_context: bool = True
    """False answers each message on its own."""
    history: list[Turn] = field(default_factory=list)

    def clear(self) -> None:
        """Forget the conversation; the system prompt stays."""
        self.history.clear()

    def ask(self, message: str) -> Generator[StreamEvent, None, None]:
        """Answer a message as events; first a notice when turns had to be dropped.

        The message and what was answered so far enter the history also when the caller stops early.

        Raises:
            UserError: The message alone is longer than the context.
        """
        question = Turn("user", message)
        prompt, dropped = self._fit(question)
        if dropped:
            yield StreamEvent("notice", f"The context is full: the oldest {dropped} exchange(s) were dropped.")
        answer: list[str] = []
        try:
            for event in self.answer_stream(prompt):
                if event.kind == "answer":
                    answer.append(event.text)
                yield event
        finally:
            if self.keep_context and "".join(answer).strip():
                self.history += [question, Turn("assistant", "".join(answer))]

    def _fit(self, question: Turn) -> tuple[list[int], int]:
        """Prompt ids within the limit, and how many of the oldest exchanges were dropped for it."""
        dropped = 0
        while True:
            prompt = self.template.encode_prompt((*self._opening(), *self._past(), question), self.thinking)
            if len(prompt) <= self.max_prompt_tokens:
                return prompt, dropped
            if not self._past():
                raise UserError(
                    f"The message makes a prompt of {len(prompt)} tokens; {self.max_prompt_tokens} fit beside the "
                    "answer. Shorten it, or lower --max_new_tokens."
                )
            del self.history[:2]
            dropped += 1

    def _opening(self) -> tuple[Turn, ...]:
        return (Turn("system", self.system),) if self.system else ()

    def _past(self) -> tuple[Turn, ...]:
        return tuple(self.history) if self.keep_context else ()


def prompt_limit(max_positions: int, max_new_tokens: int) -> int:
    """Longest prompt, tokens: what the answer leaves of the context, but at least half of it."""
    return max(max_positions - max_new_tokens, max_positions // 2)
