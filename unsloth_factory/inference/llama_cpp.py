"""Run a GGUF file through llama.cpp, in a child process."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.child import ChildProcess, memory_limit
from unsloth_factory.inference.generate import Generation
from unsloth_factory.inference.gguf_header import GgufHeader, read_header

CHILD_MODULE = "unsloth_factory.inference.llama_cpp_child"
RENDER_TIMEOUT = 60.0
SMALL_FILE_BYTES = 2**28
INSTALL_HINT = "Install it with: pip install 'unsloth-factory[export]'"


def require_library(name: str, what_for: str) -> None:
    """Refuse before any work when a library of the [export] extra is missing.

    Raises:
        UserError: It is not installed.
    """
    if find_spec(name) is None:
        raise UserError(f"{what_for} needs the library {name}, which is not installed. {INSTALL_HINT}")


class LlamaCpp:
    """A GGUF model, loaded with every tensor checked. T tokens, V vocabulary. A context manager.

    Prompts go in whole; the longest prefix that the previous prompt shares stays in the cache. The HTTP server, which
    only `render` needs, is started on the first call of it. A child that died is an error of that call; the next call
    starts another one.
    """

    def __init__(self, path: Path, *, threads: int | None = None, timeout: float = 900.0, exact: bool = False) -> None:
        """Load the file.

        Args:
            path: GGUF file.
            threads: CPU threads. Default: one for a small file, else all.
            timeout: Seconds that one call may take.
            exact: Attention in float32, so that a comparison sees the file's own rounding alone: flash attention and a
                16-bit cache alone cost up to 7e-5 nats of KL, as much as float16 weights.

        Raises:
            UserError: The file is not intact, holds non-finite values, or llama.cpp cannot load it.
        """
        self.path = Path(path)
        self.header: GgufHeader = read_header(self.path)
        require_library("cyllama", "running a GGUF file")
        # llama.cpp's threads wait by spinning: on two busy cores a 4 M model took 12 s with two, 0.6 s with one.
        small = self.path.stat().st_size < SMALL_FILE_BYTES
        self._threads, self._timeout = threads or (1 if small else os.cpu_count() or 1), timeout
        self._exact = exact
        self._renderer: ChildProcess | None = None
        self._decoder = self._start("open", self.path.name)
        self._died = False
        self.vocab_size: int = self._opened["n_vocab"]
        self.max_positions: int = self._opened["n_ctx_train"]

    def _start(self, operation: str, name: str) -> ChildProcess:
        memory = memory_limit(self.path.stat().st_size)
        child = ChildProcess(CHILD_MODULE, f"llama.cpp with {name}", memory=memory)
        try:
            request = {
                "op": operation,
                "path": str(self.path.resolve()),
                "threads": self._threads,
                "exact": self._exact,
            }
            self._opened, _ = child.call(request, timeout=self._timeout)
        except UserError as error:
            reason = next(
                (line for line in child.log_tail(40).splitlines() if "error" in line or "invalid" in line), ""
            )
            child.close()
            raise UserError(f"{error} {reason}".strip()) from None
        except BaseException:
            child.close()
            raise
        return child

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child processes."""
        self._decoder.close()
        if self._renderer:
            self._renderer.close()

    def _ask(self, operation: str, on_event: Callable[[dict], None] | None = None, **values: Any) -> tuple[dict, bytes]:
        if self._died:
            self._decoder.close()
            self._decoder = self._start("open", self.path.name)
            self._died = False
        try:
            return self._decoder.call({"op": operation, **values}, timeout=self._timeout, on_event=on_event)
        except UserError:
            self._died = not self._decoder.alive
            raise

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not 0 < len(ids) <= self.max_positions:
            raise UserError(
                f"{self.path.name}: a prompt of {len(ids)} tokens; the model takes 1 to {self.max_positions}."
            )
        return [int(token) for token in ids]

    def generate(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 512,
        stop_ids: Sequence[int] = (),
        *,
        temperature: float = 0.0,
        top_p: float = 0.95,
        top_k: int = 20,
        seed: int = 3407,
        on_token: Callable[[int], None] | None = None,
    ) -> Generation:
        """Answer one prompt.

        Args:
            ids: Prompt tokens.
            max_new_tokens: Longest answer, tokens; cut where the model's positions end.
            stop_ids: Tokens that end the answer (they are not part of it).
            temperature: 0 takes the likeliest token.
            top_p: Nucleus sampling.
            top_k: Sample from the k likeliest tokens; 0 for all.
            seed: Seed of the sampling.
            on_token: Called with each token as it is made.
        """
        prompt = self._checked(ids)
        reply, _ = self._ask(
            "generate",
            on_event=(lambda event: on_token(event["id"])) if on_token else None,
            ids=prompt,
            max_new_tokens=min(max_new_tokens, self.max_positions - len(prompt)),
            stop_ids=[int(token) for token in stop_ids],
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stream=on_token is not None,
        )
        return Generation(ids=reply["ids"], stopped=reply["stopped"])

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits of every position, float32 [T, V]."""
        reply, raw = self._ask("logits", ids=self._checked(ids))
        return np.frombuffer(raw, dtype=np.float32).reshape(reply["shape"])

    def last_logits(self, ids: Sequence[int]) -> np.ndarray:
        """Logits after the last token, float32 [V]."""
        return self.tail_logits(ids)[0]

    def tail_logits(self, ids: Sequence[int], last: int = 1) -> np.ndarray:
        """Logits after each of the last `last` tokens, float32 [last, V]; the start shared with the last call is kept.

        Raises:
            UserError: `ids` is empty or longer than the model's context; the child failed.
        """
        checked = self._checked(ids)
        assert 0 < last <= len(checked)
        reply, raw = self._ask("tail_logits", ids=checked, last=last)
        return np.frombuffer(raw, dtype=np.float32).reshape(reply["shape"])

    def tokenize(self, text: str, parse_special: bool = True) -> list[int]:
        """Token ids of a text, without BOS; `parse_special` reads control tokens written in it as such."""
        return self._ask("tokenize", text=text, parse_special=parse_special)[0]["ids"]

    def render(self, messages: Sequence[dict[str, Any]], enable_thinking: bool | None = None) -> str:
        """The prompt that llama.cpp's server makes of messages; None leaves `enable_thinking` to the server."""
        if self._renderer is None or not self._renderer.alive:
            require_library("xllamacpp", "rendering a chat with llama.cpp")
            self._renderer = self._start("open_renderer", f"{self.path.name} (server)")
        request = {"op": "render", "messages": list(messages), "enable_thinking": enable_thinking}
        return self._renderer.call(request, timeout=RENDER_TIMEOUT)[0]["prompt"]
