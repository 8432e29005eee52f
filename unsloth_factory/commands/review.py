"""`uf validate --review` writes the blind sheet, `--ratings` reads what people said."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.evaluation.judge.cases import AnswerFiles
from unsloth_factory.evaluation.judge.printing import win_line
from unsloth_factory.evaluation.validation.review import ReviewKey, make_sheet, read_ratings, review_result
from unsloth_factory.run.atomic import write_json, write_text


def write_sheet(kept: AnswerFiles, seed: int | None, limit: int, console: Console) -> None:
    """The HTML sheet, and the key beside it; the same answers and seed give the same sheet again."""
    key_path = kept.named("review_key.json")
    secret = str(seed) if seed is not None else _secret(key_path)
    key, page = make_sheet(kept.cases(limit), secret)
    sheet = write_text(kept.named("review.html"), page)
    write_json(key_path, asdict(key))
    same = f" ({key.same_text} more got the same answer from both)" if key.same_text else ""
    lines = (
        f"wrote {sheet}: {len(key.rows)} questions{same}. Open it in a browser, or send it: it needs no network.",
        f"Keep {key_path.name} to yourself: it says whose answer is which.",
        "The ratings come back with: uf validate ... --ratings FILE (several raters by commas)",
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _secret(key_path: Path) -> str:
    """That of the sheet which is there, so that ratings under way stay valid; else a new one."""
    return ReviewKey.read(key_path).secret if key_path.is_file() else secrets.token_hex(16)


def read_back(kept: AnswerFiles, files: str, console: Console) -> None:
    """Un-blind the ratings, print and save what they say."""
    key = ReviewKey.read(kept.named("review_key.json"))
    paths = [Path(part.strip()).expanduser() for part in files.split(",") if part.strip()]
    result = review_result([read_ratings(path, key) for path in paths], key, _judged(kept, key))
    console.print(f"rated by {', '.join(result['raters'])}: sheet {key.sheet}", highlight=False, markup=False)
    for line in _lines(result):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"saved {write_json(kept.named('review.json'), result)}", highlight=False, soft_wrap=True)


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [win_line(result)]
    if result["both_bad"]:
        lines.append(f"  both bad: {result['both_bad']} ratings")
    if result["not_rated"]:
        lines.append(f"  {result['not_rated']} questions are not rated yet")
    if result["left_preferred"] is not None:
        lines.append(f"  the left answer was preferred in {result['left_preferred']:.0%} of the decided ratings")
    for pair in result["agreement_of_raters"]:
        if pair["n"]:
            names = " and ".join(pair["raters"])
            lines.append(f"  {names} agree on {pair['same']:.0%} of {pair['n']}, kappa {pair['kappa']:.2f}")
    judge = result["agreement_with_judge"]
    if judge:
        lines.append(f"  the judge agrees on {judge['same']:.0%} of {judge['n']}, kappa {judge['kappa']:.2f}")
    return lines


def _judged(kept: AnswerFiles, key: ReviewKey) -> dict[int, str]:
    """The judge's verdict on each question that it compared; empty without one."""
    path = kept.named("judge_samples.jsonl")
    if not path.is_file():
        return {}
    rows = {(case.source, case.question): row for row, case in enumerate(kept.cases())}
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        row = rows.get((record["source"], record["question"]))  # a judging may have left some out
        for pair in record["pairs"]:
            if row is not None and {pair["first"], pair["second"]} == set(key.variants) and pair["winner"]:
                found[row] = str(pair["winner"])
    return found
