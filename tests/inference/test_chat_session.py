"""A chat's memory: what the prompt holds, what is dropped, what an interrupted answer leaves."""

from __future__ import annotations

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.chat import ChatSession, prompt_limit
from unsloth_factory.inference.stream import StreamEvent


class WordTemplate:
    """One token a character of content; remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[Turn, ...], bool | None]] = []

    def encode_prompt(self, turns, thinking):
        self.seen.append((tuple(turns), thinking))
        return [0] * sum(len(turn.content) for turn in turns)


def says(*events: tuple[str, str]):
    return lambda prompt: iter([StreamEvent(*event) for event in events])


def session_of(answer, **settings):
    return ChatSession(template=WordTemplate(), answer_stream=answer, **{"max_prompt_tokens": 100, **settings})


def test_history_goes_on_without_the_reasoning():
    session = session_of(says(("thinking", "hmm"), ("answer", "one "), ("answer", "two")), system="S", thinking=True)
    assert [e.text for e in session.ask("first")] == ["hmm", "one ", "two"]
    list(session.ask("second"))
    turns, thinking = session.template.seen[-1]
    assert turns == (Turn("system", "S"), Turn("user", "first"), Turn("assistant", "one two"), Turn("user", "second"))
    assert thinking is True
    session.clear()
    list(session.ask("third"))
    assert session.template.seen[-1][0] == (Turn("system", "S"), Turn("user", "third"))


def test_without_context_each_message_stands_alone():
    session = session_of(says(("answer", "yes")), keep_context=False)
    list(session.ask("first"))
    list(session.ask("second"))
    assert session.template.seen[-1][0] == (Turn("user", "second"),)


def test_the_oldest_exchanges_are_dropped_and_it_says_so():
    session = session_of(says(("answer", "a" * 20)), max_prompt_tokens=70)
    for message in ("1" * 10, "2" * 10, "3" * 10):
        list(session.ask(message))
    events = list(session.ask("4" * 10))  # 3 x 30 + 10 > 70: one exchange goes
    assert events[0].kind == "notice"
    assert "oldest 1 exchange(s)" in events[0].text
    assert session.template.seen[-1][0][0] == Turn("user", "2" * 10)
    assert [turn.content[0] for turn in session.history] == ["2", "a", "3", "a", "4", "a"]


def test_a_message_that_never_fits_is_refused_and_forgotten():
    session = session_of(says(("answer", "a")), max_prompt_tokens=10)
    with pytest.raises(UserError, match="makes a prompt of 11 tokens; 10 fit"):
        list(session.ask("x" * 11))
    assert session.history == []


def test_what_was_said_before_the_interruption_is_remembered():
    def interrupted(prompt):
        yield StreamEvent("answer", "half")
        raise KeyboardInterrupt

    session = session_of(interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(session.ask("q"))
    assert session.history == [Turn("user", "q"), Turn("assistant", "half")]
    answer = session.ask("again")  # the caller stops: closing the stream is enough
    next(answer)
    answer.close()
    assert session.history[2:] == [Turn("user", "again"), Turn("assistant", "half")]


def test_an_answer_stopped_while_thinking_leaves_nothing():
    session = session_of(says(("thinking", "hmm")))
    list(session.ask("q"))
    assert session.history == []


def test_the_limit_leaves_room_for_the_answer_but_keeps_half_for_the_prompt():
    assert prompt_limit(4096, 512) == 3584
    assert prompt_limit(1024, 4096) == 512
