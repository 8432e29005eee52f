"""Text to token ids so that a control token typed by a user never becomes a control token of the prompt.

Contents are protected before the chat template sees them: each control-token string becomes a two-character escape
of private-use code points. The rendered text is cut at the escapes; what lies between is template and clean text,
encoded jointly with control tokens parsed, exactly as llama.cpp and vLLM encode a rendered prompt. The escaped strings
are encoded as ordinary text. (transformers' `sanitize_control_tokens` came with 5.20; 5.17 swallows it silently.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from unsloth_factory.config.errors import UserError

ESCAPE = "\U000f0000"
_FIRST_SYMBOL = 0xF0001
_ESCAPED = re.compile(f"({ESCAPE}.)", re.DOTALL)


class ControlTokens:
    """Control tokens of one tokenizer: protects texts, restores them, encodes protected texts.

    Control tokens are all added tokens, special or not (<think> is not special in Qwen3), but for those of blanks
    only, which some tokenizers add for indentation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {
            index: token.content
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.content.strip(" \t\n\r▁")
        }
        self.ids: dict[str, int] = {text: index for index, text in sorted(added.items())}
        self.texts: tuple[str, ...] = tuple(self.ids)
        self.id_set: frozenset[int] = frozenset(added)
        # Longest first: of two tokens that start alike, the tokenizer takes the longer one.
        names = sorted(self.texts, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")
        self._typed = re.compile("|".join([ESCAPE, *map(re.escape, names)]))
        self._symbols = {text: chr(_FIRST_SYMBOL + number) for number, text in enumerate(self.texts)} | {ESCAPE: ESCAPE}
        self._originals = {symbol: text for text, symbol in self._symbols.items()}
        self._plain_ids: dict[str, list[int]] = {}
        self._anchor = self._find_anchor()

    def protect(self, text: str) -> str:
        """`text` with every control-token string replaced by its escape."""
        if not self._typed.search(text):
            return text
        return self._typed.sub(lambda match: ESCAPE + self._symbols[match.group()], text)

    def restore(self, text: str) -> str:
        """The inverse of `protect`."""
        return _ESCAPED.sub(lambda match: self._originals[match.group()[1]], text) if ESCAPE in text else text

    def encode(self, texts: Sequence[str], continued: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of protected texts. A continued text follows other text: it gets no begin-of-text prefix space."""
        continued = continued or [False] * len(texts)
        rows = [list(self._cut(text, follows)) for text, follows in zip(texts, continued, strict=True)]
        clean = [text for row in rows for text, escaped, _ in row if not escaped]
        flags = [follows for row in rows for _, escaped, follows in row if not escaped]
        encoded = iter(self._encode_clean(clean, flags))
        out: list[list[int]] = []
        for row in rows:
            ids: list[int] = []
            for text, escaped, _ in row:
                ids.extend(self.plain_ids(text) if escaped else next(encoded))
            out.append(ids)
        return out

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a control token's text as ordinary text: none of them is a control id.

        Raises:
            UserError: the tokenizer can write this text in no other way (a control token of one character).
        """
        if text not in self._plain_ids:
            # Turning special tokens off in the tokenizer reaches only special=True ones; cutting the string
            # reaches all, because an added token is matched inside one piece of text only.
            for cut in range(1, len(text)) or [1]:
                parts = self._encode_clean([text[:cut], text[cut:]], [True, True])
                ids = [index for part in parts for index in part]
                if not self.id_set.intersection(ids):
                    self._plain_ids[text] = ids
                    break
            else:
                raise UserError(
                    f"The text {text!r} is a control token that this tokenizer cannot write as ordinary text. "
                    "Remove it from the data or the message."
                )
        return self._plain_ids[text]

    def _cut(self, text: str, follows: bool) -> Iterator[tuple[str, bool, bool]]:
        """Pieces (text, is an escaped original, follows other text) of one protected text."""
        if ESCAPE not in text:
            yield text, False, follows
            return
        for piece in _ESCAPED.split(text):
            if piece.startswith(ESCAPE):
                yield self._originals[piece[1]], True, True
            elif piece:
                yield piece, False, follows
            follows = True

    def _encode_clean(self, texts: list[str], continued: list[bool]) -> list[list[int]]:
        if not texts:
            return []
        anchor, skip = self._anchor
        marked = [anchor + text if follows else text for text, follows in zip(texts, continued, strict=True)]
        # Through the tokenizer's own call: it resets truncation and padding that somebody else may have left on.
        rows = self.tokenizer(marked, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        if not skip:
            return rows
        return [row[skip:] if follows else row for row, follows in zip(rows, continued, strict=True)]

    def _find_anchor(self) -> tuple[str, int]:
        """A control token to put before continued texts, and how many ids it makes; ("", 0) where none is needed.

        SentencePiece tokenizers put a space before the first piece of a text; behind a control token they do not.
        """

        def ids(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]

        alone = ids("a")
        for index, token in self.tokenizer.added_tokens_decoder.items():
            if token.content in self.ids and not token.rstrip and not token.lstrip and ids(token.content) == [index]:
                return ("", 0) if ids(token.content + "a") == [index, *alone] else (token.content, 1)
        return "", 0
