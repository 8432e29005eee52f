"""Likely causes of what is wrong with a model's answers, each by a rule that can be read here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from unsloth_factory.evaluation.report import Comparison
from unsloth_factory.evaluation.validation.answers import PERPLEXITY, Answer, Sample
from unsloth_factory.inference.perplexity import AnswerLoss
from unsloth_factory.scoring import normalize_answer

FREQUENT = 0.05
"""Share of the answers from which on a fault is worth a cause, and at least 2 of them."""
MANY = 0.2


@dataclass(frozen=True)
class Cause:
    """A likely cause, what speaks for it, and what to do."""

    name: str
    evidence: str
    advice: str


@dataclass(frozen=True)
class Evidence:
    """What the rules look at: the answers of the judged variant, and what is known beside them."""

    samples: Sequence[Sample]
    answers: Sequence[Answer]
    max_new_tokens: int
    losses: Sequence[AnswerLoss | None] = ()
    """Of the references; their token counts say how long an answer has to be."""
    comparisons: Mapping[str, Comparison] | None = None

    def share(self, wrong: Callable[[Answer], bool]) -> tuple[int, bool]:
        """(how many answers are wrong in that way, whether that is worth a cause)."""
        count = sum(map(wrong, self.answers))
        return count, count >= max(2, FREQUENT * len(self.answers))

    def lengths(self, which: Sequence[int]) -> list[int]:
        """Tokens of these references, where they are known."""
        return [loss.tokens for i in which if i < len(self.losses) and (loss := self.losses[i])]


def likely_causes(seen: Evidence) -> list[Cause]:
    """Every rule that fires, the gravest first."""
    rules = (_pollution, _endings, _thinking, _language, _loops, _overfitting)
    return [cause for rule in rules for cause in rule(seen)]


def _pollution(seen: Evidence) -> Iterator[Cause]:
    leaks, frequent = seen.share(lambda answer: bool(answer.leaked) or answer.thinking == "stray tags")
    if not frequent:
        return
    tokens = Counter(token for answer in seen.answers for token in answer.leaked)
    named = ", ".join(token for token, _ in tokens.most_common(3)) or "<think> tags"
    yield Cause(
        "template pollution",
        f"{named} stand in {_of(leaks, seen)}",
        "look for control tokens written out in the training text, and train and answer with the same chat template",
    )


def _endings(seen: Evidence) -> Iterator[Cause]:
    """Cut-off answers: was there too little room, or did the model not know how to end?"""
    cut = [i for i, answer in enumerate(seen.answers) if not answer.stopped and answer.tokens]
    if len(cut) < max(2, FREQUENT * len(seen.answers)):
        return
    evidence = f"{_of(len(cut), seen)} cut off at {seen.max_new_tokens} tokens"
    needed = sorted(seen.lengths(cut))
    if not needed:
        yield Cause(
            "truncation or never learned to stop", evidence, "read the answers: do they go on about the matter?"
        )
        return
    median = needed[len(needed) // 2]
    if median > 0.8 * seen.max_new_tokens:
        yield Cause(
            "truncation",
            f"{evidence}; their references have {median} tokens (median; {needed[-1]} at most)",
            f"give --max_new_tokens {2 * needed[-1]}, or train on shorter answers",
        )
    elif len(cut) >= MANY * len(seen.answers):
        yield Cause(
            "never learned to stop",
            f"{evidence}, though their references have only {median} tokens (median)",
            "train longer, and see that --max_seq_length does not cut the ends off the training rows",
        )


def _thinking(seen: Evidence) -> Iterator[Cause]:
    missing, frequent = seen.share(lambda answer: answer.thinking == "missing")
    if frequent:
        yield Cause(
            "thinking that was not trained",
            f"the prompt asks for thinking and {_of(missing, seen)} have none",
            "give --think_chain false, or train on rows with reasoning",
        )
    endless, frequent = seen.share(lambda answer: answer.thinking == "no answer after it")
    if frequent:
        cut = sum(not answer.stopped for answer in seen.answers if answer.thinking == "no answer after it")
        longer = f"give more --max_new_tokens than {seen.max_new_tokens}" if cut else "train on rows with reasoning"
        yield Cause(
            "thinking without an end",
            f"{_of(endless, seen)} never get from the thinking to the answer ({cut} of them cut off)",
            f"{longer}, or give --think_chain false",
        )


def _language(seen: Evidence) -> Iterator[Cause]:
    switches, frequent = seen.share(lambda answer: answer.switch is not None)
    if frequent:
        (kind, _), *_ = Counter(answer.switch for answer in seen.answers if answer.switch).most_common(1)
        yield Cause(
            "the base's language shows through",
            f"{_of(switches, seen)} leave the language of their reference (mostly {kind})",
            "name the language in --system, or add training rows in it",
        )


def _loops(seen: Evidence) -> Iterator[Cause]:
    loops, frequent = seen.share(lambda answer: answer.loop is not None)
    if frequent:
        yield Cause(
            "repetition",
            f"{_of(loops, seen)} say the same again and again",
            "train with a lower learning rate or for fewer epochs, look for repeating training rows, or sample with "
            "--temperature 0.6",
        )


def _overfitting(seen: Evidence) -> Iterator[Cause]:
    compared = (seen.comparisons or {}).get(PERPLEXITY)
    if compared is not None and compared.verdict == "worse":
        yield Cause(
            "over-fitting",
            f"held-out references surprise the tuned model more than the base (perplexity {compared.base:.2f} -> "
            f"{compared.tuned:.2f})",
            "train for fewer epochs or with a lower learning rate, or on more rows",
        )
    answers = Counter(normalize_answer(answer.text) for answer in seen.answers if answer.text)
    references = Counter(normalize_answer(sample.reference) for sample in seen.samples)
    if not answers:
        return
    (text, same), *_ = answers.most_common(1)
    usual = references.most_common(1)[0][1]
    if same >= max(3, MANY * len(seen.answers)) and same > 2 * usual:
        yield Cause(
            "over-fitting (one answer for all questions)",
            f"{_of(same, seen)} are the same: {text[:60]!r}",
            "look for that answer in the training rows: it stands there too often, or training diverged",
        )


def _of(count: int, seen: Evidence) -> str:
    return f"{count} of {len(seen.answers)} answers"
