"""Turn tokens into text as they come: no half characters, thinking and answer told apart exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from unsloth_factory.data.thinking import CLOSE, OPEN, OPEN_AT_END
from unsloth_factory.inference.generate import stream_tokens
from unsloth_factory.inference.interrupts import deferred_interrupt
from unsloth_factory.inference.sampling import GREEDY, Sampling
from unsloth_factory.model.loaded import LoadedModel

if TYPE_CHECKING:
    from unsloth_factory.inference.llama_cpp import LlamaCpp

REPLACEMENT = "\ufffd"
"""What a byte-level decoder gives for a character whose last bytes have not come yet."""

Decode = Callable[[list[int]], str]


class StreamEvent(NamedTuple):
    """A piece of text, and which part of the answer it belongs to."""

    kind: Literal["thinking", "answer", "notice"]
    text: str


class TextAssembler:
    """Tokens in, whole characters out.

    A Chinese character is three bytes, which byte-level BPE may split over several tokens: text that ends in the
    replacement character is held back until the rest has come, or until `finish`.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        if text and not text.endswith(REPLACEMENT):
            piece = text[self._emitted :]
            # The newest token stays as context: SentencePiece drops the space before the first token of a text.
            self._window = [token]
            self._emitted = len(self._decode(self._window))
            return piece
        stable = text.rstrip(REPLACEMENT)
        piece = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        return piece

    def finish(self) -> str:
        """What is still held back (bytes that never became a character are shown as the replacement character)."""
        piece = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece


class ThinkingSplitter:
    """Text in, events out. Only a <think> at the very start opens thinking; later ones are ordinary text.

    Args:
        thinking_open: The prompt itself ended inside <think> (as templates of R1's family do).
    """

    def __init__(self, thinking_open: bool = False) -> None:
        self._state: Literal["start", "thinking", "gap", "answer"] = "thinking" if thinking_open else "start"
        self._held = ""
        self._thought = False

    def push(self, text: str) -> Iterator[StreamEvent]:
        """Events for a piece of text."""
        self._held += text
        if self._state == "start":
            self._start()
        if self._state == "thinking":
            yield from self._thinking()
        if self._state == "gap" and self._held.lstrip("\n"):
            self._held, self._state = self._held.lstrip("\n"), "answer"
        if self._state == "answer" and self._held:
            yield StreamEvent("answer", self._held)
            self._held = ""

    def finish(self) -> Iterator[StreamEvent]:
        """Events for what is still held back."""
        held, self._held = self._held, ""
        kind: Literal["thinking", "answer"] = "thinking" if self._state == "thinking" else "answer"
        if self._state != "gap" and held.strip():
            yield StreamEvent(kind, held.rstrip("\n") if kind == "thinking" else held)

    def _start(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self._held, self._state = text[len(OPEN) :], "thinking"
        elif text and not OPEN.startswith(text):
            self._state = "answer"

    def _thinking(self) -> Iterator[StreamEvent]:
        body, closed, rest = self._held.partition(CLOSE)
        kept = "" if closed else _maybe_closing(body)
        piece = body.rstrip("\n") if closed else body[: len(body) - len(kept)]
        if not self._thought:
            piece = piece.lstrip("\n")
        if piece:
            self._thought = True
            yield StreamEvent("thinking", piece)
        self._held, self._state = (rest, "gap") if closed else (kept, "thinking")


def _maybe_closing(text: str) -> str:
    """The end of `text` that may turn out to be line breaks and the closing mark."""
    mark = next((n for n in range(min(len(CLOSE) - 1, len(text)), 0, -1) if text.endswith(CLOSE[:n])), 0)
    body = text[: len(text) - mark].rstrip("\n")
    return text[len(body) :]


def events(tokens: Iterable[int], decode: Decode, thinking_open: bool = False) -> Iterator[StreamEvent]:
    """Events for a stream of tokens, however it was made."""
    assembler, splitter = TextAssembler(decode), ThinkingSplitter(thinking_open)
    for token in tokens:
        yield from splitter.push(assembler.push(token))
    yield from splitter.push(assembler.finish())
    yield from splitter.finish()


def decoder_of(tokenizer: Any) -> Decode:
    """Plain decoding: control tokens left out, spaces kept as they are."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stream(
    loaded: LoadedModel,
    prompt: list[int],
    *,
    stop_ids: Iterable[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
) -> Iterator[StreamEvent]:
    """One answer as it is computed.

    Args:
        loaded: The model.
        prompt: Token ids, ending where the answer begins.
        stop_ids: Tokens that end the answer; they are not shown.
        max_new_tokens: Longest answer, tokens.
        sampling: Greedy by default.
    """
    tokens = stream_tokens(
        loaded, prompt, stop_ids=frozenset(stop_ids), max_new_tokens=max_new_tokens, sampling=sampling
    )
    # Thinking can only be open at the very end of the prompt; 16 tokens hold "<think>\n" in any tokenizer.
    tail = loaded.tokenizer.decode(prompt[-16:], skip_special_tokens=False)
    yield from events(tokens, decoder_of(loaded.tokenizer), OPEN_AT_END.search(tail) is not None)


def gguf_tokens(
    model: LlamaCpp, prompt: list[int], *, stop_ids: Iterable[int], max_new_tokens: int, sampling: Sampling = GREEDY
) -> Iterator[int]:
    """The tokens of one answer of a GGUF file, without the stop token.

    One call a token (the child keeps the prompt in its cache), so that the answer can be stopped between two tokens
    without tearing the conversation with the child process.
    """
    ids, stops = list(prompt), list(stop_ids)
    for step in range(min(max_new_tokens, model.max_positions - len(prompt))):
        with deferred_interrupt():
            made = model.generate(
                ids,
                1,
                stops,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                seed=sampling.seed + step,
            )
        if made.stopped:
            return
        ids += made.ids
        yield made.ids[0]
