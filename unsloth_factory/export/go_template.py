"""The chat template as a Go template for Ollama, learned from what the Jinja template renders.

A chat template of the usual families (ChatML, Qwen, Llama 3, Mistral, DeepSeek's distills) is a frame of fixed texts
around the contents. The fixed texts are read off a few renderings with marked contents; the frame is accepted only when
it rebuilds the template's own rendering of every probe conversation, thinking on, off and unset. Anything else is left
to Ollama, which then uses the Jinja template inside the GGUF file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.export.probes import probe_conversations

_SYSTEM, _FIRST, _ANSWER, _SECOND, _REPLY, _THIRD = (
    f"Marked{word}Text" for word in ("Sys", "One", "Two", "Three", "Four", "Five")
)


@dataclass(frozen=True)
class Frame:
    """Fixed texts of a template; contents go between them.

    A prompt is: start, first question, then (after_user, answer, after_assistant, question) for each earlier round,
    then the generation prompt of the mode.
    """

    start: str
    """Before the first question, without a system prompt (it may hold the template's default one)."""
    system_start: str | None
    """Before the system prompt; None when the template knows none."""
    system_end: str
    """Between system prompt and question."""
    system_last: bool
    """The system prompt stands before the last question instead of the first (Mistral)."""
    after_user: str
    after_assistant: str
    generation: str
    """Behind the last question with thinking unset."""
    generation_on: str
    generation_off: str
    thinks: bool
    """The template has a thinking switch."""

    def render(self, turns: Sequence[Turn], thinking: bool | None) -> str:
        """What the Go template makes of these turns (the same steps in Python)."""
        system = turns[0].content if turns[0].role == "system" else ""
        messages = [turn for turn in turns if turn.role != "system"]
        before, after = self._around_system(system)
        out = [before]
        for i, turn in enumerate(messages):
            last = i == len(messages) - 1
            if turn.role == "user":
                out += [after if last and self.system_last else "", turn.content]
                out.append(self.tail(thinking) if last else self.after_user)
            else:
                out += [turn.content, "" if last else self.after_assistant]
        return "".join(out)

    def _around_system(self, system: str) -> tuple[str, str]:
        if not system or self.system_start is None:
            return self.start, ""
        if self.system_last:
            return self.start, system + self.system_end
        return self.system_start + system + self.system_end, ""

    def tail(self, thinking: bool | None) -> str:
        """Generation prompt of a mode."""
        return {None: self.generation, True: self.generation_on, False: self.generation_off}[thinking]


def learn_frame(template: ChatTemplate) -> tuple[Frame | None, str]:
    """(frame, "") when one explains every probe, else (None, what it does not explain)."""
    try:
        frame = _read_frame(template)
    except (UserError, ValueError) as error:
        return None, f"its fixed texts cannot be told from the contents ({error})"
    for turns in probe_conversations(template.control_tokens):
        # Go templates in Ollama cannot strip; those that do (Llama 3) are compared on contents without outer blanks.
        turns = tuple(replace(turn, content=turn.content.strip()) for turn in turns)
        if turns[0].role == "system" and frame.system_start is None:
            continue
        for thinking in (None, True, False):
            if frame.render(turns, thinking) != _without_bos(template, template.render_prompt(turns, thinking)):
                return None, f"it renders {turns[-1].content[:40]!r} (thinking {thinking}) in another pattern"
    return frame, ""


def _read_frame(template: ChatTemplate) -> Frame:
    question = (Turn("user", _FIRST),)
    rounds = (*question, Turn("assistant", _ANSWER), Turn("user", _SECOND))

    def render(turns: Sequence[Turn], thinking: bool | None = None) -> str:
        return _without_bos(template, template.render_prompt(turns, thinking))

    start, after_user, after_assistant, generation = _split(render(rounds), _FIRST, _ANSWER, _SECOND)
    frame = Frame(
        start=start,
        system_start=None,
        system_end="",
        system_last=False,
        after_user=after_user,
        after_assistant=after_assistant,
        generation=generation,
        generation_on=_split(render(question, True), _FIRST)[1],
        generation_off=_split(render(question, False), _FIRST)[1],
        thinks=template.supports_thinking,
    )
    try:
        longer = render((Turn("system", _SYSTEM), *rounds, Turn("assistant", _REPLY), Turn("user", _THIRD)))
    except UserError:
        return frame
    if longer.find(_SYSTEM) > longer.find(_REPLY):
        return replace(frame, system_start="", system_end=_split(longer, _SYSTEM, _THIRD)[1], system_last=True)
    before, between, _ = _split(longer, _SYSTEM, _FIRST)
    return replace(frame, system_start=before, system_end=between)


def _split(text: str, *marks: str) -> list[str]:
    """The pieces of a text around marks that must each occur once, in this order."""
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise ValueError(f"a content is rendered {'more than once' if found else 'not at all'}")
        pieces.append(before)
    return [*pieces, text]


def _without_bos(template: ChatTemplate, text: str) -> str:
    """llama.cpp puts the begin-of-text token before the prompt itself; a template must not do it again."""
    bos = template.tokenizer.bos_token
    return text.removeprefix(bos) if bos else text


def _literal(text: str) -> str:
    """Fixed text inside a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def go_template(frame: Frame, thinking: bool | None) -> str:
    """The frame as Ollama's template language (Go text/template over .System, .Messages, .Think, .IsThinkSet).

    Args:
        frame: From `learn_frame`.
        thinking: Mode of the training, used when the client does not say.
    """
    tail = _literal(frame.tail(thinking))
    reasoning = ""
    if frame.thinks:
        on, off = _literal(frame.generation_on), _literal(frame.generation_off)
        said = f"{{{{ if $.Think }}}}{on}{{{{ else }}}}{off}{{{{ end }}}}"
        tail = f"{{{{ if $.IsThinkSet }}}}{said}{{{{ else }}}}{tail}{{{{ end }}}}"
        # Ollama reads from this block how reasoning is marked; it is rendered only behind the last question.
        reasoning = "{{ if and $m.Thinking (gt $i $lastUser) }}<think>\n{{ $m.Thinking }}\n</think>\n\n{{ end }}"
    start, in_question = _literal(frame.start), ""
    if frame.system_start is not None:
        end = _literal(frame.system_end)
        if frame.system_last:
            in_question = f"{{{{ if and $.System (eq $i $lastUser) }}}}{{{{ $.System }}}}{end}{{{{ end }}}}"
        else:
            head = _literal(frame.system_start)
            start = f"{{{{ if .System }}}}{head}{{{{ .System }}}}{end}{{{{ else }}}}{start}{{{{ end }}}}"
    return (
        "{{ $lastUser := -1 }}"
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $lastUser = $i }}{{ end }}{{ end }}'
        f"{start}"
        "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq $m.Role "user" }}'
        f"{in_question}{{{{ $m.Content }}}}"
        f"{{{{ if $last }}}}{tail}{{{{ else }}}}{_literal(frame.after_user)}{{{{ end }}}}"
        '{{ else if eq $m.Role "assistant" }}'
        f"{reasoning}{{{{ $m.Content }}}}{{{{ if not $last }}}}{_literal(frame.after_assistant)}{{{{ end }}}}"
        "{{ end }}{{ end }}"
    )
