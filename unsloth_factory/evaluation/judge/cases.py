"""The answers that a validation left on disk, as cases to judge or to review."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.evaluation.judge.prompts import Case


@dataclass(frozen=True)
class AnswerFiles:
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


def with_others(cases: Sequence[Case], paths: Sequence[Path]) -> tuple[list[Case], str | None]:
    """The cases with the answers of further validations, each under its folder's name, and a note on what is left out.

    Of a validation with base and tuned the tuned answers are taken. Questions are matched by their text and reference.

    Args:
        cases: Those of the first validation.
        paths: Run folders, or folders that hold a validation.json.

    Raises:
        UserError: A folder holds no validation, or none of the same questions.
    """
    merged = list(cases)
    for path in paths:
        folder = path if (path / "validation.json").is_file() else path / "validation_results"
        kept = AnswerFiles(folder)
        if not kept.there:
            raise UserError(f"--judge_against {path}: no answers of a validation there. Make them: uf validate.")
        name = folder.resolve().parent.name if folder.name == "validation_results" else folder.resolve().name
        if name in merged[0].answers:
            raise UserError(f"--judge_against {path}: a second model by the name of {name}. Rename the folder.")
        theirs = kept.cases()
        variant = "tuned" if "tuned" in theirs[0].answers else next(iter(theirs[0].answers))
        known = {(case.question, case.reference): case.answers[variant] for case in theirs}
        merged = [
            replace(case, answers={**case.answers, name: known[case.question, case.reference]})
            for case in merged
            if (case.question, case.reference) in known
        ]
        if not merged:
            raise UserError(
                f"--judge_against {path}: none of its questions is among ours. Validate on the same dataset."
            )
    left_out = len(cases) - len(merged)
    return merged, f"{left_out} of {len(cases)} questions were not answered by all: left out." if left_out else None


def _case(record: dict[str, Any], variants: list[str]) -> Case:
    return Case(
        source=str(record["source"]),
        question=str(record["question"]),
        reference=str(record["reference"]),
        answers={variant: str(record[variant]["answer"]) for variant in variants},
        earlier=tuple((str(turn["role"]), str(turn["content"])) for turn in record.get("earlier", [])),
    )
