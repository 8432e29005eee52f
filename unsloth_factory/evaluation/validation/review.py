"""Blind review by people: a sheet that shows two answers in hidden order, and what its ratings say."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.evaluation.judge.prompts import Case
from unsloth_factory.evaluation.pages import ASSETS
from unsloth_factory.scoring.pairwise import kappa, win_rate

TIE = "tie"
CHOICES = ("left", "right", "same", "both_bad")
LARGEST_RATINGS = 64 << 20


@dataclass(frozen=True)
class ReviewKey:
    """What un-blinds a sheet; it stays with whoever made it."""

    sheet: str
    variants: tuple[str, str]
    """(against, of): the win rate is that of the second."""
    left: Mapping[str, str]
    """item -> variant shown on the left."""
    rows: Mapping[str, int]
    """item -> number of the question, from 0."""
    same_text: int
    """Questions left out, because both gave the same answer: ties."""
    secret: str

    @classmethod
    def read(cls, path: Path) -> ReviewKey:
        """From its JSON.

        Raises:
            UserError: There is none, or it is damaged.
        """
        if not path.is_file():
            raise UserError(f"{path} is missing: it says which answer was whose. Was the sheet made here (--review)?")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**values, "variants": tuple(values["variants"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}). Make the sheet again: uf validate --review.") from None


def make_sheet(cases: Sequence[Case], secret: str) -> tuple[ReviewKey, str]:
    """The key and the HTML page of a blind comparison of two variants.

    Order of the questions and side of each answer follow from `secret`, which the page does not hold, nor does it name
    the variants.

    Args:
        cases: Questions with answers; base and tuned are compared, else the first variant and the last.
        secret: Any text that raters do not know.

    Raises:
        UserError: There is one variant alone, or all answers are the same.
    """
    variants = _two(list(cases[0].answers))
    different = [row for row, case in enumerate(cases) if len({case.answers[v].strip() for v in variants}) == 2]
    if not different:
        raise UserError(f"{variants[0]} and {variants[1]} gave the same answer to all questions: nothing to review.")
    digest = hashlib.sha256(secret.encode())
    for case in cases:
        digest.update(json.dumps([case.question, *(case.answers[v] for v in variants)]).encode())
    generator = random.Random(digest.hexdigest())
    order = generator.sample(different, len(different))
    left = {str(number + 1): generator.choice(variants) for number in range(len(order))}
    rows = {str(number + 1): row for number, row in enumerate(order)}
    sheet = hashlib.sha256(f"sheet {digest.hexdigest()}".encode()).hexdigest()[:12]
    items = [_item(item, cases[row], left[item], variants) for item, row in rows.items()]
    key = ReviewKey(sheet, variants, left, rows, len(cases) - len(different), secret)
    return key, _page({"id": sheet, "items": items})


def _two(variants: list[str]) -> tuple[str, str]:
    if {"base", "tuned"} <= set(variants):
        return "base", "tuned"
    if len(variants) < 2:
        raise UserError(
            f"A review compares two models; these are the answers of {', '.join(variants)} alone. Validate a run with "
            "an adapter (--run), or several files (--gguf all)."
        )
    return variants[0], variants[-1]


def _item(item: str, case: Case, left: str, variants: tuple[str, str]) -> dict[str, str]:
    right = variants[1] if left == variants[0] else variants[0]
    return {
        "id": item,
        "earlier": "\n\n".join(f"{role}: {text}" for role, text in case.earlier),
        "question": case.question,
        "reference": case.reference,
        "left": case.answers[left],
        "right": case.answers[right],
    }


def _page(sheet: dict[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("review.html.jinja").render(sheet=sheet)


@dataclass(frozen=True)
class Ratings:
    """One person's ratings."""

    rater: str
    choices: Mapping[str, str]
    """item -> left, right, same, both_bad."""
    comments: Mapping[str, str]


def read_ratings(path: Path, key: ReviewKey) -> Ratings:
    """The file that a sheet saved.

    Raises:
        UserError: It is none, belongs to another sheet, or holds something that the sheet does not write.
    """
    try:
        if path.stat().st_size > LARGEST_RATINGS:
            raise UserError(f"--ratings {path}: {path.stat().st_size} bytes; this is not a file that a sheet saves.")
        values = json.loads(path.read_text(encoding="utf-8"))
        sheet, entries = values["sheet"], values["ratings"]
        choices = {str(entry["item"]): str(entry["choice"]) for entry in entries}
        comments = {str(entry["item"]): str(entry.get("comment") or "") for entry in entries}
        rater = str(values.get("rater") or path.stem)
    except FileNotFoundError:
        raise UserError(f"--ratings {path}: no such file. It is what the sheet's Save button downloads.") from None
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--ratings {path}: not a file that a sheet saves ({error!r}).") from None
    if sheet != key.sheet:
        raise UserError(
            f"--ratings {path}: these are ratings of sheet {sheet}; the answers here were shown in sheet {key.sheet}. "
            "Give the run or --save_dir that the sheet was made from."
        )
    wrong = [item for item, choice in choices.items() if item not in key.rows or choice not in CHOICES]
    if wrong or len(choices) != len(entries):
        raise UserError(f"--ratings {path}: item {wrong[0] if wrong else 'twice'} is not of this sheet.")
    if not choices:
        raise UserError(f"--ratings {path}: nothing is rated in it yet.")
    return Ratings(rater, choices, {item: text for item, text in comments.items() if text.strip()})


def unblinded(ratings: Ratings, key: ReviewKey) -> dict[int, str]:
    """Number of the question -> the variant that was better, or "tie"."""
    against, of = key.variants
    found = {}
    for item, choice in ratings.choices.items():
        left = key.left[item]
        right = of if left == against else against
        found[key.rows[item]] = {"left": left, "right": right}.get(choice, TIE)
    return found


def review_result(all_ratings: Sequence[Ratings], key: ReviewKey, judged: Mapping[int, str]) -> dict[str, Any]:
    """Win rate, agreement of the raters with each other and with the judge, and every verdict.

    With several raters a question is won by the variant that more of them preferred. Questions to which both models
    gave the same text count as ties.

    Args:
        all_ratings: One a person.
        key: Of their sheet.
        judged: Number of the question -> the judge's verdict; empty without a judge.
    """
    against, of = key.variants
    by_rater = [unblinded(ratings, key) for ratings in all_ratings]
    verdicts = {
        row: winner
        for row in sorted(key.rows.values())
        if (winner := _majority([found[row] for found in by_rater if row in found])) is not None
    }
    winners = list(verdicts.values())
    rate = win_rate(winners.count(of), winners.count(TIE) + key.same_text, winners.count(against))
    choices = [choice for ratings in all_ratings for choice in ratings.choices.values()]
    sided = [choice for choice in choices if choice in ("left", "right")]
    counts = {name: value for name, value in asdict(rate).items() if name != "value"}
    return {
        "sheet": key.sheet,
        "raters": [ratings.rater for ratings in all_ratings],
        "of": of,
        "against": against,
        "n": rate.n,
        "win_rate": rate.value,
        **counts,
        "verdict": rate.verdict,
        "same_text": key.same_text,
        "not_rated": len(key.rows) - len(verdicts),
        "both_bad": choices.count("both_bad"),
        "left_preferred": sided.count("left") / len(sided) if sided else None,
        "agreement_of_raters": _agreements(by_rater, [ratings.rater for ratings in all_ratings]),
        "agreement_with_judge": _agreement(verdicts, judged),
        "verdicts": {str(row): winner for row, winner in verdicts.items()},
        "comments": [
            {"rater": ratings.rater, "row": key.rows[item], "comment": text}
            for ratings in all_ratings
            for item, text in ratings.comments.items()
        ],
    }


def _majority(votes: Sequence[str]) -> str | None:
    counts = {vote: votes.count(vote) for vote in votes if vote != TIE}
    if not counts:
        return TIE if votes else None
    best = max(counts.values())
    leaders = [vote for vote, count in counts.items() if count == best]
    return leaders[0] if len(leaders) == 1 else TIE


def _agreements(by_rater: Sequence[Mapping[int, str]], names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"raters": [names[i], names[j]], **(_agreement(by_rater[i], by_rater[j]) or {"n": 0})}
        for i in range(len(by_rater))
        for j in range(i + 1, len(by_rater))
    ]


def _agreement(first: Mapping[int, str], second: Mapping[int, str]) -> dict[str, Any] | None:
    """Share of equal verdicts and Cohen's kappa, on the questions that both have."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    one, other = [first[row] for row in both], [second[row] for row in both]
    same = sum(a == b for a, b in zip(one, other, strict=True))
    return {"n": len(both), "same": same / len(both), "kappa": kappa(one, other)}
