"""The answers that a validation left on disk, as cases to judge or to review."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.evaluation.judge.prompts import Case


@dataclass(frozen=True)
class KeptAnswers:
    """Report and records of a finished validation.

    Attributes:
        folder: Where they lie.
        kind: "" for those of base and tuned, "gguf" for those of GGUF files, "endpoint" for those of a server's model.
    """

    folder: Path
    kind: str = ""

    @property
    def report(self) -> Path:
        """The report's JSON."""
        return self.folder / f"{self.kind or 'validation'}.json"

    @property
    def samples(self) -> Path:
        """One JSON object a question."""
        return self.named("samples.jsonl")

    def named(self, name: str) -> Path:
        """A file that belongs to these answers: "judge.json" -> "gguf_judge.json" for those of GGUF files."""
        return self.folder / (f"{self.kind}_{name}" if self.kind else name)

    @property
    def there(self) -> bool:
        """Whether a validation has left its answers."""
        return self.report.is_file() and self.samples.is_file()

    def cases(self, limit: int | None = None) -> list[Case]:
        """Question, reference and every variant's answer.

        Raises:
            UserError: A file is damaged.
        """
        try:
            variants = list(json.loads(self.report.read_text(encoding="utf-8"))["metrics"])
            lines = self.samples.read_text(encoding="utf-8").splitlines()[:limit]
            cases = [_case(json.loads(line), variants) for line in lines]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.samples}: not the answers of a validation ({error!r}). Make them again: uf validate."
            ) from None
        if not cases or not variants:
            raise UserError(f"{self.samples} holds no answers. Make them again: uf validate.")
        return cases


def _case(record: dict[str, Any], variants: list[str]) -> Case:
    return Case(
        source=str(record["source"]),
        question=str(record["question"]),
        reference=str(record["reference"]),
        answers={variant: str(record[variant]["answer"]) for variant in variants},
        earlier=tuple((str(turn["role"]), str(turn["content"])) for turn in record.get("earlier", [])),
    )
