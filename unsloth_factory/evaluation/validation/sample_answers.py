"""Answers to a few held-out questions while a training runs, scored as `uf validate` scores them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation
from unsloth_factory.evaluation.validation.answers import read_answer, samples_of
from unsloth_factory.inference.generate import generate
from unsloth_factory.knowledge import DomainPack
from unsloth_factory.model.loaded import LoadedModel

SCORES = ("exact match", "term coverage", "association coverage", "stopped by itself")
"""Metrics of a validation that are shares; here their names have underscores."""


class SampleAnswers:
    """A few held-out questions, always the same ones, answered greedily by a model as it is at that moment.

    Args:
        loaded: The model; generation leaves its mode and the random state as they were.
        template: Renders the prompts, in the run's thinking mode.
        conversations: Held-out ones; each is asked up to its last answer, which is the reference.
        count: Questions to ask, spread over the conversations; those that do not fit are left out.
        thinking: The run's thinking mode.
        pack: Domain pack, for term and association coverage.
        max_new_tokens: Longest answer, tokens.
        longest_prompt: Longer questions are left out, tokens.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: ChatTemplate,
        conversations: Sequence[Conversation],
        *,
        count: int,
        thinking: bool | None = None,
        pack: DomainPack | None = None,
        max_new_tokens: int = 128,
        longest_prompt: int = 2048,
    ) -> None:
        self._loaded, self._template, self._thinking, self._pack = loaded, template, thinking, pack
        self._max_new_tokens = max_new_tokens
        samples = samples_of(conversations, None)
        prompts = [template.encode_prompt(sample.prompt, thinking) for sample in samples]
        most = min(longest_prompt, loaded.max_positions - max_new_tokens)
        fitting = [i for i, ids in enumerate(prompts) if len(ids) <= most]
        count = min(count, len(fitting))
        chosen = [fitting[i * len(fitting) // count] for i in range(count)]
        self._samples = [samples[i] for i in chosen]
        self._prompts = [prompts[i] for i in chosen]

    def __len__(self) -> int:
        return len(self._samples)

    def ask(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Answer some of the questions together; records with source, prompt, reference, answer, stopped, scores."""
        made = generate(
            self._loaded,
            [self._prompts[number] for number in numbers],
            stop_ids=self._template.stop_ids,
            max_new_tokens=self._max_new_tokens,
            batch_size=max(1, len(numbers)),
        )
        records = []
        for number, generation in zip(numbers, made, strict=True):
            sample = self._samples[number]
            answer = read_answer(generation, sample, self._template, self._thinking, self._pack)
            records.append(
                {
                    "source": sample.source,
                    "prompt": sample.question,
                    "reference": sample.reference,
                    "answer": answer.text if answer.text or not answer.reasoning else f"<think> {answer.reasoning}",
                    "stopped": answer.stopped,
                    "scores": {name.replace(" ", "_"): answer.scores[name] for name in SCORES},
                }
            )
        return records
