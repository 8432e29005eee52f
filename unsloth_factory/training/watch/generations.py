"""Answers to held-out questions at each evaluation: kept, scored, shown. They are greedy: no random number is drawn."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import Any

from accelerate.utils import gather_object

from unsloth_factory.config.settings import FEWEST_SCORED
from unsloth_factory.scoring import wilson_interval
from unsloth_factory.training.memory.shortage import Shortage, attempt
from unsloth_factory.training.session import Session

TOGETHER = 8
"""Answers that are generated at a time."""
SHOWN = 2
"""Answers that are printed."""
MOST_CHARACTERS = 100
KEPT = ("source", "prompt", "reference", "answer", "stopped")


def ask(session: Session, leave: Callable[[], bool]) -> list[dict[str, Any]] | None:
    """Answers to all questions, in their order; none where there is nobody to ask; None when `leave` said so.

    With several processes each answers its share. Out of GPU memory: once more one by one, then without.
    """
    answerer = session.job.answerer
    if answerer is None:
        return []
    processes, index = session.accelerator.num_processes, session.accelerator.process_index
    mine = list(range(len(answerer)))[index::processes]
    records: list[tuple[int, dict[str, Any]]] = []
    for start in range(0, len(mine), TOGETHER):
        if leave():
            return None
        part = mine[start : start + TOGETHER]
        records += _survive(session, part)
    if processes > 1:
        records = gather_object(records)
    return [record for _, record in sorted(records, key=lambda pair: pair[0])]


def _survive(session: Session, numbers: list[int]) -> list[tuple[int, dict[str, Any]]]:
    """(number, answer) of some questions, one by one when the memory runs out; what does not fit alone is left out."""
    answerer = session.job.answerer
    assert answerer is not None
    whole = attempt(partial(answerer.ask, numbers), session.meter.release)
    if not isinstance(whole, Shortage):
        return list(zip(numbers, whole, strict=True))
    singly = [attempt(partial(answerer.ask, [number]), session.meter.release) for number in numbers]
    pairs = zip(numbers, singly, strict=True)
    made = [(number, records[0]) for number, records in pairs if not isinstance(records, Shortage)]
    if len(made) < len(numbers):
        session.progress.say(
            f"Warning: out of {session.meter.name} while answering held-out questions ({whole.message}); "
            f"{len(numbers) - len(made)} are left out this time"
        )
    return made


def keep(session: Session, records: Sequence[dict[str, Any]]) -> None:
    """Append them to generations.jsonl."""
    if records and session.accelerator.is_main_process:
        lines = [{"step": session.state.step} | {key: record[key] for key in KEPT} for record in records]
        session.generations.append(*lines)


def figures(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean of each score with its 95 % interval: eval_NAME, eval_NAME_low, eval_NAME_high.

    A score of 0 or 1 has Wilson's interval (Wilson 1927), another one that of the normal distribution. Fewer than
    `FEWEST_SCORED` values say nothing, and are left out.
    """
    found: dict[str, float] = {}
    for name in records[0]["scores"] if records else ():
        values = [record["scores"][name] for record in records if record["scores"][name] is not None]
        if len(values) < FEWEST_SCORED:
            continue
        mean = fmean(values)
        if set(values) <= {0.0, 1.0}:
            low, high = wilson_interval(round(sum(values)), len(values))
        else:
            margin = 1.96 * stdev(values) / math.sqrt(len(values))
            low, high = max(0.0, mean - margin), min(1.0, mean + margin)
        found |= {f"eval_{name}": mean, f"eval_{name}_low": low, f"eval_{name}_high": high}
    return found


def show(session: Session, records: Sequence[dict[str, Any]]) -> None:
    """Print the first of them, clipped."""
    for record in records[:SHOWN]:
        cut = "" if record["stopped"] else " (cut off)"
        session.progress.say(
            f"  question   {_clipped(record['prompt'])}\n  answer     {_clipped(record['answer'])}{cut}\n"
            f"  reference  {_clipped(record['reference'])}"
        )


def _clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 1] + "…"
