"""Scores of finished subjects, kept on disk: an evaluation that was stopped goes on where it was.

A file holds the log-probabilities of one subject by one variant of one model. Its name is a hash of all that they
depend on: the model's identity and the very token ids of the prompts and choices. So a changed prompt, another number
of worked examples or another adapter finds nothing, and needs no list of settings that might be incomplete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from unsloth_factory.evaluation.choice.prompts import ChoicePrompt
from unsloth_factory.run.atomic import write_json

FORMAT = 1
"""Raised when the way of scoring changes: older files are then computed anew."""


class KeptScores:
    """The scores of one variant of one model.

    Args:
        folder: Where the files lie; made when the first is written.
        model: All of the model that its scores depend on: fingerprint, adapter, dtype, engine.

    Attributes:
        found: Subjects that were taken from the disk.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self._folder = folder
        self._model = model
        self.found = 0

    def read(self, subject: str, prompts: Sequence[ChoicePrompt]) -> np.ndarray | None:
        """Float64 [n, choices] as they were written, None when there are none of exactly these prompts."""
        key = self._key(prompts)
        try:
            kept = json.loads(self._path(subject, key).read_text(encoding="utf-8"))
            scores = np.array(kept["logprobs"], dtype=np.float64)
        except (OSError, ValueError, KeyError, TypeError):
            return None  # not there, or damaged: it is computed
        if kept.get("key") != key or scores.shape != (len(prompts), len(prompts[0].choices)):
            return None
        self.found += 1
        return scores

    def write(self, subject: str, prompts: Sequence[ChoicePrompt], scores: np.ndarray) -> None:
        """Keep the scores of a finished subject."""
        if not np.isfinite(scores).all():
            return
        key = self._key(prompts)
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(subject, key), {"subject": subject, "key": key, "logprobs": scores.tolist()})

    def _key(self, prompts: Sequence[ChoicePrompt]) -> str:
        tokens = [[prompt.ids, prompt.choices] for prompt in prompts]
        return hashlib.sha256(json.dumps([FORMAT, self._model, tokens]).encode()).hexdigest()

    def _path(self, subject: str, key: str) -> Path:
        return self._folder / f"{re.sub(r'[^0-9A-Za-z_-]', '_', subject)[:60]}-{key[:16]}.json"
