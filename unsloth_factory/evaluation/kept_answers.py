"""Generated answers, kept on disk one by one: a benchmark of hours that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from unsloth_factory.inference.generate import Generation

FORMAT = 1
"""Raised when the way of answering changes: older files are then left alone."""


class KeptAnswers:
    """Greedy answers of one model, a line each in a file that only grows; its name is a hash of what they depend on.

    Args:
        folder: Where the file lies; made with the first answer.
        model: All of the model that its answers depend on.
        max_new_tokens: Longest answer, tokens.
        stop_ids: Tokens that end it.
    """

    def __init__(self, folder: Path, model: str, max_new_tokens: int, stop_ids: Sequence[int]) -> None:
        key = json.dumps([FORMAT, model, max_new_tokens, sorted(stop_ids)])
        self._path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.jsonl"
        self._known = self._read()

    def find(self, prompt: Sequence[int]) -> Generation | None:
        """The answer to exactly these tokens, None where there is none."""
        return self._known.get(_digest(prompt))

    def add(self, prompt: Sequence[int], answer: Generation) -> None:
        """Keep an answer."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"prompt": _digest(prompt), "ids": list(answer.ids), "stopped": answer.stopped})
        with open(self._path, "a", encoding="utf-8") as file:
            # In front too: a line that a stopped process left half-written must not swallow this one.
            file.write(f"\n{line}\n")
        self._known[_digest(prompt)] = answer

    def _read(self) -> dict[str, Generation]:
        known = {}
        lines = self._path.read_text(encoding="utf-8", errors="replace").split("\n") if self._path.is_file() else []
        for line in lines:
            try:
                kept = json.loads(line)
                known[kept["prompt"]] = Generation([int(token) for token in kept["ids"]], bool(kept["stopped"]))
            except (ValueError, KeyError, TypeError):
                continue  # a blank line, or one half-written: that answer is made again
        return known


def _digest(prompt: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(list(map(int, prompt))).encode()).hexdigest()
