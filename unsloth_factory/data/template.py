"""The model's own chat template: the one renderer of training, validation, chat and export.

What is trained follows from the template alone. For assistant turn i the prompt is the rendering of the turns before
it with the generation prompt, exactly as inference renders it; the answer is what the rendering of the turns up to i
adds to that, up to and including the end-of-turn token. No marker string is searched for in the conversation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data import template_sandbox
from unsloth_factory.data.control_tokens import ControlTokens
from unsloth_factory.data.thinking import CLOSE, EMPTY_AT_END, OPEN, OPEN_AT_END, split_thinking
from unsloth_factory.data.types import Conversation, PreferencePair, TokenPair, TokenSample, Turn

_CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + 'END_OF_TURN\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_PROBE = "Sentinel"


@dataclass(frozen=True)
class Exchange:
    """One assistant turn: protected prompt and answer text; the answer ends with the end-of-turn token."""

    prompt: str
    answer: str


class ChatTemplate:
    """A tokenizer with its chat template.

    Attributes:
        tokenizer: The tokenizer it renders and encodes with.
        source: Jinja text.
        sha256: Of the source.
        end_of_turn, end_of_turn_id: The control token that closes an assistant turn.
        stop_ids, stop_strings: Where generation ends: end of turn, and the end-of-sequence tokens.
        control_tokens: Every added token, special or not.
        supports_thinking: The template has an enable_thinking switch.
    """

    def __init__(self, tokenizer: Any, source: str, *, eos_ids: Sequence[int] | int | None = ()) -> None:
        self.tokenizer = tokenizer
        self.source = source
        self.sha256 = hashlib.sha256(source.encode("utf-8")).hexdigest()
        self._control = ControlTokens(tokenizer)
        self.control_tokens = self._control.texts
        self._opened: dict[bool | None, bool] = {}
        question = (Turn("user", _PROBE),)
        self.supports_thinking = self.render_prompt(question, True) != self.render_prompt(question, False)
        self.end_of_turn = self._find_end_of_turn()
        self.end_of_turn_id = self._control.ids[self.end_of_turn]
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        further = [eos_ids] if isinstance(eos_ids, int) else list(eos_ids or ())
        self.stop_ids = tuple(dict.fromkeys([self.end_of_turn_id, *eos, *further]))
        self.stop_strings = tuple(tokenizer.convert_ids_to_tokens(list(self.stop_ids)))

    @classmethod
    def from_tokenizer(
        cls, tokenizer: Any, override: str | None = None, *, eos_ids: Sequence[int] | int | None = ()
    ) -> ChatTemplate:
        """The tokenizer's template, or `override`: the built-in name chatml, or a Jinja file.

        Args:
            tokenizer: A transformers tokenizer.
            override: Value of --chat_template.
            eos_ids: Further stop tokens: eos_token_id of generation_config.json, as it stands there.

        Raises:
            UserError: There is no template, or no control token closes its assistant turns.
        """
        if override is not None:
            return cls(tokenizer, _named_template(override, tokenizer), eos_ids=eos_ids)
        source = tokenizer.chat_template
        if isinstance(source, dict):
            source = source.get("default")
        if not source:
            raise UserError(
                f"The model {tokenizer.name_or_path or ''} has no chat template (a base model?). "
                "Give one: --chat_template chatml, or --chat_template FILE.jinja."
            )
        return cls(tokenizer, source, eos_ids=eos_ids)

    def render_prompt(self, turns: Sequence[Turn], thinking: bool | None = None) -> str:
        """The prompt text for the next assistant turn; `thinking` sets enable_thinking, None leaves it unset."""
        return self._control.restore(self._prompt(turns, thinking, "the prompt"))

    def encode_prompt(self, turns: Sequence[Turn], thinking: bool | None = None) -> list[int]:
        """Ids of the prompt for the next assistant turn; control tokens typed by the user stay ordinary text."""
        return self._control.encode([self._prompt(turns, thinking, "the prompt")])[0]

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text that continues a prompt (a choice letter, say); control tokens in it stay ordinary text."""
        return self._control.encode([self._control.protect(text)], [True])[0]

    def encode_conversation(self, conversation: Conversation) -> list[TokenSample]:
        """Training rows of one conversation; see `encode_conversations`."""
        return self.encode_conversations([conversation])[0]

    def encode_conversations(self, conversations: Sequence[Conversation]) -> list[list[TokenSample]]:
        """Training rows of each conversation.

        One row with several trained spans when the template only ever appends to what it has rendered; else (Qwen3
        drops earlier reasoning) one row per assistant turn, in order. Rows with reasoning are rendered with
        enable_thinking=true, rows without with =false. Trained ids equal what inference sees: the ids before each
        trained span are `encode_prompt` of the turns before it.
        """
        exchanges = [self.exchanges(conversation.turns, conversation.source) for conversation in conversations]
        joined = self._encode_joined(exchanges, [conversation.source for conversation in conversations])
        split = [number for number, sample in enumerate(joined) if sample is None]
        flat = [(exchange, conversations[number].source) for number in split for exchange in exchanges[number]]
        single = iter(self._encode_exchanges([exchange for exchange, _ in flat], [source for _, source in flat]))
        return [
            [sample] if sample is not None else [next(single) for _ in exchanges[number]]
            for number, sample in enumerate(joined)
        ]

    def encode_answer(self, turns: Sequence[Turn], source: str) -> TokenSample:
        """One row in which only the last turn, an assistant's, is trained."""
        return self._encode_exchanges([self._exchange(turns, source)], [source])[0]

    def encode_pair(self, pair: PreferencePair) -> TokenPair:
        """Chosen and rejected row; both open with the same prompt ids."""
        return self.encode_pairs([pair])[0]

    def encode_pairs(self, pairs: Sequence[PreferencePair]) -> list[TokenPair]:
        """Rows of many pairs; thinking is on for a pair when one of its answers has reasoning."""
        exchanges, sources = [], []
        for pair in pairs:
            thinking = bool(pair.chosen.reasoning or pair.rejected.reasoning)
            for answer in (pair.chosen, pair.rejected):
                exchanges.append(self._exchange((*pair.prompt, answer), pair.source, thinking))
                sources.append(pair.source)
        samples = self._encode_exchanges(exchanges, sources)
        return [TokenPair(chosen, rejected) for chosen, rejected in zip(samples[::2], samples[1::2], strict=True)]

    def decode_answer(self, ids: Sequence[int], thinking: bool | None = None) -> tuple[str | None, str, list[str]]:
        """(reasoning or None, answer, control tokens that leaked into it) of generated ids.

        Args:
            ids: Generated ids; stop tokens at the end are dropped.
            thinking: The mode the prompt was rendered with.
        """
        rest = list(ids)
        while rest and rest[-1] in self.stop_ids:
            rest.pop()
        opened = self.opens_thinking(thinking)
        close = self._control.ids.get(CLOSE)
        if close is None:
            text, leaked = self._decode(rest)
            return *split_thinking(text, opened=opened), leaked
        # Where the tokenizer has think tokens only these frame the reasoning, not the same words in plain letters.
        first = self._control.ids.get(OPEN)
        if first in rest and not self._decode(rest[: rest.index(first)])[0].strip():
            opened = True
            rest.remove(first)
        cut = rest.index(close) if close in rest else (len(rest) if opened else None)
        reasoning, leaked = self._decode(rest[:cut] if cut is not None else [])
        answer, leaked_later = self._decode(rest[cut + 1 :] if cut is not None else rest)
        return reasoning.strip() or None, answer.strip(), leaked + leaked_later

    def split_thinking(self, text: str, thinking: bool | None = None) -> tuple[str | None, str]:
        """(reasoning or None, answer) of generated text, knowing whether the prompt had opened the block."""
        return split_thinking(text, opened=self.opens_thinking(thinking))

    def opens_thinking(self, thinking: bool | None = None) -> bool:
        """Whether the generation prompt ends inside an open <think> block."""
        if thinking not in self._opened:
            prompt = self.render_prompt((Turn("user", _PROBE),), thinking)
            self._opened[thinking] = OPEN_AT_END.search(prompt) is not None
        return self._opened[thinking]

    def _decode(self, ids: Sequence[int]) -> tuple[str, list[str]]:
        """Text without control tokens, and the control tokens that were in it."""
        leaked = [self.tokenizer.convert_ids_to_tokens(index) for index in ids if index in self._control.id_set]
        kept = [index for index in ids if index not in self._control.id_set]
        text = self.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text, leaked

    def exchanges(self, turns: Sequence[Turn], source: str) -> list[Exchange]:
        """Prompt and answer text of every assistant turn.

        Raises:
            UserError: The template refuses the conversation; the message names `source`.
        """
        return [self._exchange(turns[: i + 1], source) for i, turn in enumerate(turns) if turn.role == "assistant"]

    def _exchange(self, turns: Sequence[Turn], source: str, thinking: bool | None = None) -> Exchange:
        last = turns[-1]
        prompt = self._prompt(turns[:-1], bool(last.reasoning) if thinking is None else thinking, source)
        answer = self._answer(prompt, self._render(turns, source), last, source)
        end = answer.find(self.end_of_turn)
        if end < 0:
            raise UserError(f"{source}: the chat template does not close the assistant turn with {self.end_of_turn}.")
        return Exchange(prompt, answer[: end + len(self.end_of_turn)])

    def _answer(self, prompt: str, full: str, turn: Turn, source: str) -> str:
        """What the model must write after `prompt`, reasoning included.

        Templates that know reasoning_content render it. Others strip it (DeepSeek's distills, whose generation prompt
        opens the block) or do not know it: then it is spliced in as `<think> reasoning </think> answer`.
        """
        reasoning = self._control.protect(turn.reasoning.strip()) if turn.reasoning else ""
        opened = OPEN_AT_END.search(prompt)
        empty = EMPTY_AT_END.search(prompt)
        if full.startswith(prompt):
            answer = full[len(prompt) :]
            block, close, _ = answer.partition(CLOSE)
            # Contents are protected: a </think> here is the template's own.
            if not reasoning or (close and reasoning in block):
                return answer
        elif opened and full.startswith(prompt[: opened.start()]):
            answer = full[opened.start() :]
        elif empty and full.startswith(prompt[: empty.start()]) and not reasoning:
            return full[empty.start() :]
        else:
            raise UserError(
                f"{source}: the chat template renders this assistant turn differently from its generation prompt "
                f"(…{prompt[-40:]!r}), so that the trained part is unknown. Give another one: --chat_template FILE."
            )
        head = "" if opened else OPEN + "\n"
        return f"{head}{reasoning}\n{CLOSE}\n\n{answer.lstrip()}"

    def _prompt(self, turns: Sequence[Turn], thinking: bool | None, source: str) -> str:
        switch = {} if thinking is None else {"enable_thinking": thinking}
        return self._render(turns, source, add_generation_prompt=True, **switch)

    def _render(self, turns: Sequence[Turn], source: str, **switches: Any) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        messages = []
        for turn in turns:
            message = {"role": turn.role, "content": self._control.protect(turn.content)}
            if turn.reasoning:
                message["reasoning_content"] = self._control.protect(turn.reasoning)
            messages.append(message)
        try:
            return template_sandbox.render(self.tokenizer, self.source, messages, switches)
        except UserError:
            raise
        except TemplateSyntaxError as error:
            raise UserError(
                f"The chat template is broken in line {error.lineno}: {error.message}. "
                "Mend it, or give another one: --chat_template chatml, or --chat_template FILE.jinja."
            ) from None
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            # A template is a program: what its expressions raise comes through as it is.
            roles = ", ".join(turn.role for turn in turns)
            raise UserError(
                f"{source}: the model's chat template refuses these turns ({roles}): {error}. "
                "Where it knows no system role, leave out --domain, --system and the rows' system texts; "
                "otherwise mend the row or give another template: --chat_template FILE."
            ) from error

    def _find_end_of_turn(self) -> str:
        rendered = self._render((Turn("user", "Question"), Turn("assistant", _PROBE)), "the chat template")
        tail = rendered.rpartition(_PROBE)[2]
        found = self._control.pattern.search(tail)
        if found is None:
            raise UserError(
                "The chat template puts no end-of-turn control token behind the assistant's text "
                f"({tail!r} follows it), so that the model could never learn to stop. "
                "Give a template that ends the turn with the tokenizer's end token "
                f"({self.tokenizer.eos_token}): --chat_template chatml, or --chat_template FILE.jinja."
            )
        return found.group()

    def _encode_exchanges(self, exchanges: Sequence[Exchange], sources: Sequence[str]) -> list[TokenSample]:
        texts = [text for exchange in exchanges for text in (exchange.prompt, exchange.answer)]
        ids = self._control.encode(texts, [False, True] * len(exchanges))
        return [
            _sample([(ids[2 * number], False), (ids[2 * number + 1], True)], source)
            for number, source in enumerate(sources)
        ]

    def _encode_joined(self, rows: Sequence[list[Exchange]], sources: Sequence[str]) -> list[TokenSample | None]:
        """One sample per conversation, None where its turns cannot share one (or where there is no turn)."""
        pieces = [_append_only(row) for row in rows]
        texts, continued = [], []
        for row, parts in zip(rows, pieces, strict=True):
            if len(parts) > 2:
                texts.append(row[-1].prompt)
                continued.append(False)
            texts.extend(parts)
            continued.extend(number > 0 for number in range(len(parts)))
        encoded = iter(self._control.encode(texts, continued))
        samples: list[TokenSample | None] = []
        for parts, source in zip(pieces, sources, strict=True):
            whole = next(encoded) if len(parts) > 2 else None
            spans = [(next(encoded), number % 2 == 1) for number in range(len(parts))]
            context = [index for ids, _ in spans[:-1] for index in ids]
            same = parts and (whole is None or whole == context)
            samples.append(_sample(spans, source) if same else None)
        return samples


def _append_only(exchanges: Sequence[Exchange]) -> list[str]:
    """Context and answer texts in turn when each prompt extends the one before and its answer; else nothing."""
    parts: list[str] = []
    done = ""
    for exchange in exchanges:
        if not exchange.prompt.startswith(done):
            return []
        parts += [exchange.prompt[len(done) :], exchange.answer]
        done = exchange.prompt + exchange.answer
    return parts


def _sample(spans: Sequence[tuple[list[int], bool]], source: str) -> TokenSample:
    ids = np.concatenate([np.asarray(part, dtype=np.int32) for part, _ in spans])
    trained = np.concatenate([np.full(len(part), flag) for part, flag in spans])
    return TokenSample(ids, trained, source)


def _named_template(name: str, tokenizer: Any) -> str:
    if name == "chatml":
        # A base without <|im_end|> learns to stop with its own end token.
        end = "<|im_end|>" if "<|im_end|>" in tokenizer.get_vocab() else tokenizer.eos_token
        return _CHATML.replace("END_OF_TURN", end or "")
    path = Path(name)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(
                f"--chat_template {name}: not UTF-8 text (byte {error.start}); a Jinja file saved as UTF-8 is expected."
            ) from None
    raise UserError(f"--chat_template {name}: neither a built-in name (chatml) nor a file. Check the path.")
