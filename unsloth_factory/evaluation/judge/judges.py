"""Who judges: a model behind an OpenAI-compatible address, or one that is loaded here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.endpoint import Endpoint, Message, Reply, RequestRefused
from unsloth_factory.inference.generate import generate
from unsloth_factory.inference.parallel import in_parallel
from unsloth_factory.model.loaded import LoadedModel


class EndpointJudge:
    """A server's model, several requests at a time.

    Args:
        endpoint: The server.
        max_tokens: Longest reply.
        at_a_time: Requests under way together.
    """

    def __init__(self, endpoint: Endpoint, max_tokens: int, at_a_time: int) -> None:
        self._endpoint, self._max_tokens = endpoint, max_tokens
        self.name, self.at_a_time = endpoint.model, at_a_time

    def ask(self, prompts: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply | Exception]]:
        """As `asking.Judge` says."""
        return in_parallel(
            lambda messages: self._endpoint.chat(messages, max_tokens=self._max_tokens), prompts, self.at_a_time
        )


class LoadedJudge:
    """A local model, answering greedily in batches, without thinking where its template has the switch.

    Args:
        loaded: The model.
        template: Its chat template.
        max_tokens: Longest reply.
        at_a_time: Prompts a batch.
    """

    def __init__(self, loaded: LoadedModel, template: ChatTemplate, max_tokens: int, at_a_time: int) -> None:
        self._loaded, self._template, self._max_tokens = loaded, template, max_tokens
        self.name, self.at_a_time = f"{loaded.path.name} {loaded.fingerprint[:12]}", at_a_time

    def ask(self, prompts: Sequence[Sequence[Message]]) -> Iterator[tuple[int, Reply | Exception]]:
        """As `asking.Judge` says."""
        thinking = False if self._template.supports_thinking else None
        encoded = []
        for index, messages in enumerate(prompts):
            turns = [Turn(message["role"], message["content"]) for message in messages]  # type: ignore[arg-type]
            ids = self._template.encode_prompt(turns, thinking)
            if len(ids) + self._max_tokens > self._loaded.max_positions:
                limit = self._loaded.max_positions - self._max_tokens
                yield index, RequestRefused(f"A judge's prompt has {len(ids)} tokens; {limit} fit beside its reply.")
                continue
            encoded.append((index, ids))
        # Longest first: the batches are even, and memory peaks at once.
        encoded.sort(key=lambda pair: -len(pair[1]))
        for start in range(0, len(encoded), self.at_a_time):
            batch = encoded[start : start + self.at_a_time]
            began = time.monotonic()
            made = generate(
                self._loaded,
                [ids for _, ids in batch],
                stop_ids=self._template.stop_ids,
                max_new_tokens=self._max_tokens,
                batch_size=self.at_a_time,
            )
            seconds = (time.monotonic() - began) / len(batch)
            for (index, ids), generation in zip(batch, made, strict=True):
                _, text, _ = self._template.decode_answer(generation.ids, thinking)
                yield index, Reply(text, None, generation.stopped, len(ids), len(generation.ids), seconds)
