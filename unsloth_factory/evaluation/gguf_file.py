"""A GGUF file as what an evaluation asks: it scores choices and answers prompts through llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.evaluation.choice.prompts import ChoicePrompt
from unsloth_factory.evaluation.choice.scored import logits_scorer
from unsloth_factory.inference.generate import Generation
from unsloth_factory.inference.llama_cpp import LlamaCpp


class GgufFile:
    """A file that is opened when it is first asked. A context manager.

    Args:
        path: The file.
        check: May refuse the opened file.
    """

    def __init__(self, path: Path, check: Callable[[LlamaCpp], None] | None = None) -> None:
        self._path = path
        self._check = check
        self._opened: LlamaCpp | None = None

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *_: object) -> None:
        if self._opened:
            self._opened.close()
            self._opened = None

    @property
    def model(self) -> LlamaCpp:
        """The opened file.

        Raises:
            UserError: It is damaged, or was refused.
        """
        if self._opened is None:
            self._opened = LlamaCpp(self._path)
            if self._check:
                self._check(self._opened)
        return self._opened

    def score(self, prompts: Sequence[list[int]], choices: Sequence[Sequence[list[int]]]) -> np.ndarray:
        """Log-probabilities of the choices, float64 [n, choices]; a `choice.Scorer`."""
        return logits_scorer(self.model.tail_logits)(prompts, choices)

    def answer(self, prompts: Sequence[list[int]], stop_ids: Sequence[int], max_new_tokens: int) -> list[Generation]:
        """Greedy answers, in the order of the prompts."""
        return [self.model.generate(prompt, max_new_tokens, stop_ids) for prompt in prompts]


@dataclass
class TokenComparison:
    """Whether llama.cpp's tokenizer splits the prompts as the model's own does.

    The model's own ids are what is scored; a difference says what a user of the file would meet who sends text.
    """

    tokenizer: Any
    control_tokens: Sequence[str]
    compared: int = 0
    equal: int = 0
    first: str = ""
    """End of the first prompt that differs."""

    def add(self, file: GgufFile, prompts: Sequence[ChoicePrompt]) -> None:
        """Compare these prompts. Left out: those with control tokens typed as text, which text cannot say."""
        control = set(self.tokenizer.convert_tokens_to_ids(list(self.control_tokens)))
        for prompt in prompts:
            if sum(map(prompt.text.count, self.control_tokens)) != sum(token in control for token in prompt.ids):
                continue
            self.compared += 1
            if _same(file.model.tokenize(prompt.text), prompt.ids, self.tokenizer.bos_token_id):
                self.equal += 1
            else:
                self.first = self.first or prompt.text[-60:]

    def note(self, name: str) -> str | None:
        """What a report should say; None where all are equal."""
        if self.equal == self.compared:
            return None
        return (
            f"{name}: llama.cpp's tokenizer splits {self.compared - self.equal} of {self.compared} prompts into other "
            f"tokens than the model's own (first: ...{self.first!r}). The model's own were scored."
        )


def _same(found: list[int], ids: Sequence[int], bos: int | None) -> bool:
    """Equal but for a BOS that only the model's tokenizer adds, a cut beginning, and an end that the choices share."""
    own = list(ids[1:] if ids[0] == bos and found[:1] != [bos] else ids)
    return own in (found[: len(own)], found[-len(own) :])
