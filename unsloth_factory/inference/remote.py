"""A model behind an OpenAI-compatible address, asked like one that is loaded here: prompts in, generations out.

The server renders the prompts and counts the tokens; what stands for token ids here are numbers of pieces of text, so
that everything that scores generations can score these too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.thinking import CLOSE, OPEN, split_thinking
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.endpoint import Endpoint, Message, Reply
from unsloth_factory.inference.generate import Generation, Progress
from unsloth_factory.inference.parallel import in_parallel
from unsloth_factory.inference.sampling import GREEDY, Sampling

CONTROL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>",
    "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "<s>", "</s>", "<start_of_turn>", "<end_of_turn>",
)  # fmt: skip
"""Of the common families; which ones the server's model has, it does not say."""

MOST_LOGPROBS = 20  # the most that hosted servers give


class RemoteTemplate(ChatTemplate):
    """Stands where a local model's chat template stands: prompts stay messages, answers stay text."""

    def __init__(self) -> None:  # no tokenizer: nothing of the base's is set up or used
        self.source = self.sha256 = ""
        self.stop_ids, self.stop_strings = (), ()
        self.control_tokens = CONTROL_TOKENS
        self.supports_thinking = False
        self._pieces: list[str] = []

    def encode_prompt(self, turns: Sequence[Turn], thinking: bool | None = None) -> list[int]:
        """The messages, as code points of their JSON."""
        return list(map(ord, json.dumps([{"role": turn.role, "content": turn.content} for turn in turns])))

    def render_prompt(self, turns: Sequence[Turn], thinking: bool | None = None) -> str:
        """The messages as JSON, since the server's rendering is not known."""
        return "".join(map(chr, self.encode_prompt(turns, thinking)))

    def encode_text(self, text: str) -> list[int]:
        """Code points, as those of the prompts."""
        return list(map(ord, text))

    @staticmethod
    def messages(prompt: Sequence[int]) -> list[Message]:
        """What `encode_prompt` was given."""
        return json.loads("".join(map(chr, prompt)))

    def encode_reply(self, reply: Reply) -> list[int]:
        """As many numbers as the server counted tokens (characters where it counts none)."""
        text = f"{OPEN}\n{reply.reasoning}\n{CLOSE}\n\n{reply.text}" if reply.reasoning else reply.text
        count = reply.completion_tokens or len(text)
        first = len(self._pieces)
        self._pieces += [text[i * len(text) // count : (i + 1) * len(text) // count] for i in range(count)]
        return list(range(first, first + count))

    def decode_answer(self, ids: Sequence[int], thinking: bool | None = None) -> tuple[str | None, str, list[str]]:
        """(reasoning or None, answer, nothing: leaks can only be seen in the text)."""
        return *split_thinking("".join(self._pieces[number] for number in ids)), []


@dataclass
class RemoteModel:
    """An endpoint's model under test.

    Attributes:
        prompt_tokens: Of each prompt so far, as the server counted; 0 where it does not.
    """

    endpoint: Endpoint
    template: RemoteTemplate
    thinking: bool | None = None
    """Sent as chat_template_kwargs.enable_thinking, which vLLM and llama.cpp's server take; None sends nothing."""
    at_a_time: int = 4
    prompt_tokens: list[int] = field(default_factory=list)
    unknown: int = 0
    """Questions of `letter_logprobs` for which no letter was among the likeliest tokens."""

    def letter_logprobs(self, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> np.ndarray:
        """Log-probabilities of each prompt's choices, float64 [n, choices], from the first token's likeliest ones.

        A letter that is not among the 20 likeliest tokens gets less than all of them. Where none is, the letters
        differ by a number drawn from the prompt alone: a fixed order would score as "always A".

        Args:
            prompts: As the template encodes them.
            choices: One letter each, as the template encodes it.

        Raises:
            UserError: The server gives no log-probabilities, or a request failed for good.
        """
        extra = self._switch() | {"logprobs": True, "top_logprobs": MOST_LOGPROBS}

        def ask(prompt: list[int]) -> Reply:
            return self.endpoint.chat(self.template.messages(prompt), max_tokens=1, extra=extra)

        rows: dict[int, list[float]] = {}
        tokens = [0] * len(prompts)
        for index, reply in in_parallel(ask, prompts, self.at_a_time):
            if isinstance(reply, Exception):
                raise reply
            if not reply.first_token:
                raise UserError(
                    f"{self.endpoint.url} gives no log-probabilities (logprobs of chat completions), by which the "
                    "choices are scored. Take a benchmark whose answers are generated (--task gsm8k), or load the "
                    "model here (--model)."
                )
            letters = ["".join(map(chr, choice)) for choice in choices[index]]
            rows[index] = self._row(prompts[index], letters, reply.first_token)
            tokens[index] = reply.prompt_tokens
        self.prompt_tokens += tokens
        return np.array([rows[index] for index in range(len(prompts))])

    def _row(self, prompt: list[int], letters: Sequence[str], top: Mapping[str, float]) -> list[float]:
        """Letters with and without a space before them are the same answer; their probabilities add up."""
        floor = min(top.values()) - 1.0
        found = [[value for token, value in top.items() if token.strip() == letter] for letter in letters]
        if any(found):
            return [float(np.logaddexp.reduce(values)) if values else floor for values in found]
        self.unknown += 1
        digest = hashlib.sha256(np.array(prompt, dtype=np.int64).tobytes()).digest()
        return [floor - 1.0 + digest[number] / 256 for number in range(len(letters))]

    def _switch(self) -> dict[str, Any]:
        return {} if self.thinking is None else {"chat_template_kwargs": {"enable_thinking": self.thinking}}

    def answer(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        on_progress: Progress | None = None,
    ) -> list[Generation]:
        """Answer every prompt.

        Args:
            prompts: As the template encodes them.
            max_new_tokens: Longest answer, tokens.
            sampling: Temperature, top_p and seed; the server has no common name for the rest.
            on_progress: Called with (answers done, all).

        Raises:
            UserError: A request failed for good: an answer that is missing would make the scores wrong.
        """
        drawn = sampling.temperature > 0
        extra = self._switch()

        def ask(prompt: list[int]) -> Reply:
            return self.endpoint.chat(
                self.template.messages(prompt),
                max_tokens=max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p if drawn else None,
                seed=sampling.seed if drawn else None,
                extra=extra,
            )

        replies: dict[int, Reply] = {}
        for index, reply in in_parallel(ask, prompts, self.at_a_time):
            if isinstance(reply, Exception):
                raise reply
            replies[index] = reply
            if on_progress:
                on_progress(len(replies), len(prompts))
        ordered = [replies[index] for index in range(len(prompts))]
        self.prompt_tokens += [reply.prompt_tokens for reply in ordered]
        return [Generation(self.template.encode_reply(reply), reply.finished) for reply in ordered]
