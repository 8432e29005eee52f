"""BERTScore (Zhang et al. 2020, arXiv:1904.09675) by its own library, with an encoder from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

LONGEST = 512
"""Tokens, where neither tokenizer nor configuration names a limit."""


class BertScorer:
    """F1 of the best cosine matches between the tokens of an answer and those of its reference.

    Args:
        folder: An encoder (BERT, RoBERTa, ...) with its tokenizer.
        layer: Hidden layer whose vectors are compared, from 1. None: the library's choice for a folder named as a
            published model (bert-base-chinese: 8, roberta-large: 17), else the last.

    Raises:
        ImportError: bert-score is not installed.
        ValueError: There is no encoder in the folder, or it has no such layer.
    """

    def __init__(self, folder: Path, layer: int | None = None) -> None:
        if find_spec("bert_score") is None:
            raise ImportError("bert-score is not installed")
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            layers = int(config.num_hidden_layers)
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{folder} holds no encoder: {str(error).splitlines()[0]}") from error
        self.folder, self.layer = folder, layer or _usual_layer(folder.name) or layers
        if not 1 <= self.layer <= layers:
            raise ValueError(f"{folder} has {layers} layers, not {self.layer}")
        self._scorer: Any = None  # the library puts it on a GPU where there is one
        self._longest = int(getattr(config, "max_position_embeddings", None) or LONGEST)

    def __call__(self, answers: Sequence[str], references: Sequence[str]) -> list[float]:
        """F1 of each answer, without rescaling; 0 for an empty one. Texts beyond the encoder's length are cut off."""
        full = [index for index, answer in enumerate(answers) if answer.strip() and references[index].strip()]
        scores = [0.0] * len(answers)
        if full:
            _, _, found = self._open().score([answers[i] for i in full], [references[i] for i in full])
            for index, value in zip(full, found.tolist(), strict=True):
                scores[index] = value
        return scores

    @property
    def signature(self) -> str:
        """What a report says of it: scores of other encoders, layers or versions cannot be compared."""
        from importlib.metadata import version

        return f"bert-score {version('bert-score')}, {self.folder.name}, layer {self.layer}, no idf, not rescaled"

    def _open(self) -> Any:
        if self._scorer is None:
            from bert_score import BERTScorer

            self._scorer = BERTScorer(model_type=str(self.folder), num_layers=self.layer)
            tokenizer = self._scorer._tokenizer
            # the library hands it to a 32-bit number, and a tokenizer without a limit says 1e30
            tokenizer.model_max_length = min(tokenizer.model_max_length, self._longest)
        return self._scorer


def _usual_layer(name: str) -> int | None:
    from bert_score.utils import model2layers

    known = {key.rsplit("/", 1)[-1]: layers for key, layers in model2layers.items()}
    return known.get(name)
