"""Generated answers, kept on disk as they come: an evaluation that was stopped goes on where it was.

One file holds the greedy answers of one variant of one model under one set of limits; a line is an answer, found by the
hash of its prompt's token ids. Whatever changes a prompt or the model so finds nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.evaluation.generated.generative import Answerer
from unsloth_factory.inference.generate import Generation, Progress
from unsloth_factory.run.atomic import write_text

FORMAT = 1
"""Raised when the way of answering changes: older files are then not read."""


class KeptAnswers:
    """The answers of one variant of one model.

    Args:
        folder: Where the file lies; made when the first is written.
        model: All of the model that its answers depend on: fingerprint, adapter, dtype, engine.
        settings: What else they depend on: longest answer, thinking budget, stop tokens.
        chunk: Answers that are generated, and so may be lost, together.

    Attributes:
        path: The file.
        found: Answers that were taken from the disk.
    """

    def __init__(self, folder: Path, model: str, settings: Mapping[str, Any], *, chunk: int = 64) -> None:
        identity = json.dumps([FORMAT, model, dict(settings)], sort_keys=True)
        self.path = folder / f"answers-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.jsonl"
        self.found = 0
        self._chunk = chunk

    def complete(
        self, answer: Answerer, prompts: Sequence[list[int]], on_progress: Progress | None = None
    ) -> list[Generation]:
        """The answers to all prompts, in their order: those that are kept, and the others generated and kept.

        Args:
            answer: Generates answers.
            prompts: Token ids.
            on_progress: Called with (answers there, all).
        """
        kept = self._read()
        keys = [_key(prompt) for prompt in prompts]
        self.found += sum(key in kept for key in keys)
        # Like lengths together; a prompt that comes twice is answered once.
        first = {key: row for row, key in reversed(list(enumerate(keys))) if key not in kept}
        missing = sorted(first.values(), key=lambda row: -len(prompts[row]))
        for start in range(0, len(missing), self._chunk):
            rows = missing[start : start + self._chunk]
            answers = dict(zip((keys[row] for row in rows), answer([prompts[row] for row in rows]), strict=True))
            self._append(answers)
            kept |= answers
            if on_progress:
                on_progress(sum(key in kept for key in keys), len(keys))
        return [kept[key] for key in keys]

    def _read(self) -> dict[str, Generation]:
        if not self.path.is_file():
            return {}
        kept, whole = {}, []
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        for line in lines:
            try:
                value = json.loads(line)
                ids, stopped = value["ids"], value["stopped"]
                if not isinstance(stopped, bool) or not all(isinstance(token, int) for token in ids):
                    continue
                kept[str(value["prompt"])] = Generation(list(ids), stopped)
            except (ValueError, KeyError, TypeError):
                continue
            whole.append(line)
        if len(whole) < len(lines):  # a process that was killed while it wrote: later lines must not join its rest
            write_text(self.path, "".join(f"{line}\n" for line in whole))
        return kept

    def _append(self, answers: Mapping[str, Generation]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            for key, answer in answers.items():
                line = {"prompt": key, "ids": [int(token) for token in answer.ids], "stopped": bool(answer.stopped)}
                file.write(json.dumps(line) + "\n")


def _key(prompt: Sequence[int]) -> str:
    return hashlib.sha256(np.array(prompt, dtype=np.int64).tobytes()).hexdigest()
