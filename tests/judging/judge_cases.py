"""Cases for a judge, and judges with habits that are known."""

from __future__ import annotations

import json
import re

from unsloth_factory.evaluation.judge.cache import ReplyCache
from unsloth_factory.evaluation.judge.judges import EndpointJudge
from unsloth_factory.evaluation.judge.judging import judge_answers
from unsloth_factory.evaluation.judge.prompts import DIMENSIONS, Case
from unsloth_factory.inference.endpoint import Endpoint

FOURS = json.dumps({"reason": "fine", **dict.fromkeys(DIMENSIONS, 4)})


def case(number: int, **answers: str) -> Case:
    return Case(f"d.csv:{number}", f"question {number}?", f"reference {number}", answers)


def shown(body: dict) -> dict[str, str]:
    """Blocks of a prompt by name."""
    text = body["messages"][0]["content"]
    return dict(re.findall(r"=== ([A-Z ]+?) \w{10} ===\n(.*?)(?=\n\n=== )", text, re.DOTALL))


def longer_wins(body: dict) -> str:
    """A judge that scores by length, without a bias."""
    blocks = shown(body)
    if "ANSWER" in blocks:
        return json.dumps({**dict.fromkeys(DIMENSIONS, min(5, len(blocks["ANSWER"]))), "reason": "length"})
    one, other = len(blocks["ANSWER A"]), len(blocks["ANSWER B"])
    return json.dumps({"winner": "tie" if one == other else "A" if one > other else "B", "reason": "length"})


def judged(server, cases, path, **options):
    judge = EndpointJudge(Endpoint(server.url, "fake", sleep=lambda _: None), 100, 4)
    return judge_answers(cases, judge, ReplyCache(path, judge.name), **options)
