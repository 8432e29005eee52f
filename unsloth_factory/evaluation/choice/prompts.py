"""From a question to token ids: worked examples, chat template, and the letters as they are tokenised after the prompt.

With a chat template the worked examples are turns (`shots_as: turns`): a user turn with the question, an assistant turn
with the letter, so that the letter is scored exactly where the model has just been shown to put it. `shots_as: prompt`
puts everything into one user turn, as does `--no_chat_template` without the turn around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.evaluation.choice.benchmark import Benchmark, Mode, Subject
from unsloth_factory.evaluation.choice.questions import Question


@dataclass(frozen=True)
class ChoicePrompt:
    """A prompt with its choices. `choices` are the token ids that follow `ids` for each letter."""

    ids: list[int]
    choices: list[list[int]]
    text: str
    """As rendered, control tokens included."""

    @property
    def sha256(self) -> str:
        """Of the rendered text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class SubjectPrompts:
    """All prompts of a subject, with the worked examples that fitted."""

    prompts: list[ChoicePrompt]
    shots: int
    cut: int
    """Prompts whose beginning had to be cut even without worked examples."""


@dataclass(frozen=True, kw_only=True)
class PromptMaker:
    """Renders and encodes the questions of one benchmark for one model."""

    benchmark: Benchmark
    tokenizer: Any
    template: Any | None
    """The model's ChatTemplate; None gives the plain text."""
    lang: str = "zh"
    thinking: bool | None = False
    mode: Mode = "letter"
    """`text` does not list the options: each one's text is scored as the answer, and the worked examples end in it.

    `generate` lists them and asks for a letter at the end of a free answer; there are no choices to score."""

    def subject(
        self, subject: Subject, shots: Sequence[Question], questions: Sequence[Question], max_tokens: int
    ) -> SubjectPrompts:
        """Encode all questions of a subject behind the same worked examples.

        Examples are taken away from the end until the longest prompt fits in `max_tokens`; without examples the
        beginning of a prompt is cut.
        """
        for count in range(len(shots), -1, -1):
            prompts = self.encode(subject, shots[:count], questions)
            if all(len(prompt.ids) + len(max(prompt.choices, key=len, default=[])) <= max_tokens for prompt in prompts):
                return SubjectPrompts(prompts, count, 0)
        fitted = [_cut(prompt, max_tokens) for prompt in prompts]
        return SubjectPrompts(fitted, 0, sum(new is not old for new, old in zip(fitted, prompts, strict=True)))

    def encode(self, subject: Subject, shots: Sequence[Question], questions: Sequence[Question]) -> list[ChoicePrompt]:
        """Questions, each behind the same worked examples."""
        answers = [dict(self._choices(shot))[str(shot.answer)] for shot in shots]
        texts = [[self._text(item) for item in (*shots, question)] for question in questions]
        intro = self.benchmark.prompt(self.lang).intro.replace("{subject}", subject.title(self.lang))
        for parts in texts:
            parts[0] = intro + parts[0]
        asked = [
            [] if self.mode == "generate" else [text for _, text in self._choices(question)] for question in questions
        ]
        if self.template is None:
            return self._plain(texts, answers, asked)
        return [self._rendered(parts, answers, choices) for parts, choices in zip(texts, asked, strict=True)]

    def _rendered(self, texts: list[str], answers: list[str], asked: list[str]) -> ChoicePrompt:
        """A question in the model's chat template."""
        assert self.template is not None
        turns = self._turns(texts, answers)
        rendered = self.template.render_prompt(turns, self.thinking)
        ids = list(self.template.encode_prompt(turns, self.thinking))
        if not asked:
            return ChoicePrompt(ids, [], rendered)
        tail = _after_last(rendered, self.template.control_tokens)
        joined = continuations(self.template.encode_text, ids, tail, asked)
        kept, choices = joined or (ids, [self.template.encode_text(text) for text in asked])
        return ChoicePrompt(kept, choices, rendered)

    def _plain(self, texts: list[list[str]], answers: list[str], asked: list[list[str]]) -> list[ChoicePrompt]:
        """Questions as plain text."""
        delimiter = self.benchmark.prompt(self.lang).delimiter
        rendered = [_one_text(parts, [delimiter + answer for answer in answers]) for parts in texts]
        # All at once: the tokenizer then takes every core. C-Eval's 1,346 prompts take 1.3 s on one.
        encoded = self.tokenizer(rendered)["input_ids"] if rendered else []
        alone = partial(self.tokenizer.encode, add_special_tokens=False)
        prompts = []
        for text, ids, choices in zip(rendered, encoded, asked, strict=True):
            wanted = [delimiter + choice for choice in choices]
            # A tokenizer that splits the last line differently on its own (SentencePiece) is given the whole text.
            joined = continuations(alone, ids, text.rsplit("\n", 1)[-1], wanted)
            joined = joined or continuations(self.tokenizer.encode, ids, text, wanted)
            assert joined is not None
            prompts.append(ChoicePrompt(*joined, text))
        return prompts

    def _choices(self, question: Question) -> list[tuple[str, str]]:
        """(letter, text that answers) of each option."""
        letters = self.benchmark.letters
        if self.mode == "generate":
            _, answer = self.benchmark.prompt(self.lang).freely(self.lang)
            return [(letter, answer.replace("{letter}", letter)) for letter in letters]
        return list(zip(letters, letters if self.mode == "letter" else question.options, strict=True))

    def _text(self, question: Question) -> str:
        prompt = self.benchmark.prompt(self.lang)
        letters = self.benchmark.letters
        lines = [
            prompt.choice.format(letter=letter, text=option)
            for letter, option in zip(letters, question.options, strict=True)
        ]
        # Not str.format: the template is applied to the question, never the question to the template.
        text = prompt.freely(self.lang)[0] if self.mode == "generate" else prompt.template(self.mode)
        return text.replace("{choices}", "\n".join(lines)).replace("{question}", question.text)

    def _turns(self, texts: list[str], answers: list[str]) -> tuple[Turn, ...]:
        if self.benchmark.shots_as == "prompt":
            return (Turn("user", _one_text(texts, answers)),)
        turns: list[Turn] = []
        for text, answer in zip(texts, answers, strict=False):
            turns += [Turn("user", text), Turn("assistant", answer)]
        return (*turns, Turn("user", texts[-1]))


def _one_text(texts: list[str], answers: list[str]) -> str:
    examples = [text + answer for text, answer in zip(texts, answers, strict=False)]
    return "\n\n".join([*examples, texts[-1]])


def _after_last(text: str, marks: Sequence[str]) -> str:
    """The text behind the last control token, where tokenisation starts anew."""
    end = max((text.rfind(mark) + len(mark) for mark in marks if mark in text), default=0)
    return text[end:]


def _cut(prompt: ChoicePrompt, max_tokens: int) -> ChoicePrompt:
    room = max_tokens - len(max(prompt.choices, key=len, default=[]))
    if room < 1:
        raise UserError(f"The model's context of {max_tokens} tokens is too short for any question.")
    if len(prompt.ids) <= room:
        return prompt
    return ChoicePrompt(prompt.ids[-room:], prompt.choices, prompt.text)


def continuations(
    encode: Callable[[str], list[int]], ids: list[int], tail: str, choices: Sequence[str]
) -> tuple[list[int], list[list[int]]] | None:
    """Prompt ids and each choice's ids, as the tokenizer splits the choice right behind the prompt.

    A choice can merge with the prompt's last characters into one token. What all choices still have in common with the
    prompt stays prompt; the rest belongs to the choices, so that the sums of log-probabilities compare.

    Args:
        encode: Text -> token ids.
        ids: The prompt's token ids.
        tail: The end of the prompt's text, from a place where tokenisation starts anew.
        choices: Texts of the choices.

    Returns:
        None when the prompt does not end with the ids of `tail`, so that nothing can be said of what follows.
    """
    base = list(encode(tail)) if tail else []
    if base != ids[len(ids) - len(base) :]:
        return None
    joint = [list(encode(tail + choice)) for choice in choices]
    kept = 0
    while all(kept < len(row) - 1 and kept < len(base) and row[kept] == base[kept] for row in joint):
        kept += 1
    return ids[: len(ids) - len(base) + kept], [row[kept:] for row in joint]


def question_record(question: Question, prompt: ChoicePrompt, shots: int) -> dict[str, Any]:
    """What is kept of a question that was asked, before what the models made of it."""
    record: dict[str, Any] = {
        "subject": question.subject,
        "id": question.id,
        "prompt_sha256": prompt.sha256,
        "prompt_tokens": len(prompt.ids),
        "shots": shots,
    }
    return record if question.answer is None else record | {"answer": question.answer}
