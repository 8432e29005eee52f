"""Where a chat template is rendered: a known one in this process, any other in a child with limits.

A template comes with the model and is a program. transformers' sandbox keeps it from running code of the system, not
from two nested loops that take for ever or from `'%1000000000d'` that takes all memory (both checked). So a template
whose text is not known here is rendered by a child process that is killed after `SECONDS` and may use `MEMORY`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError

# SHA-256 of texts that were read: Qwen3's published template (the bundled model's), and the built-in chatml.
KNOWN = frozenset(
    {
        "87a2728cb8dc9fe424d624542f6060ec05a1d285ebbec578bb078900e33396b5",
        "fcbc2adf2e3e880bfb5efca2f1b5145af5a8d26302a01e1635da6af59bfcd7c5",
    }
)
SECONDS = 10.0
MEMORY = 2**30
# A rendering is its contents and fixed texts around them; this is far above both.
MOST_CHARACTERS = 2**24
START_SECONDS = 120.0
PASSED_ON = ("PATH", "HOME", "TMPDIR", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
PASSED_PREFIXES = ("LANG", "LC_", "COVERAGE")
PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def render(tokenizer: Any, source: str, messages: Sequence[Mapping[str, Any]], switches: Mapping[str, Any]) -> str:
    """The template's text for these messages, as `tokenizer.apply_chat_template` makes it.

    Args:
        tokenizer: Gives the special tokens.
        source: Jinja text.
        messages: role, content and perhaps reasoning_content.
        switches: add_generation_prompt, enable_thinking.

    Raises:
        UserError: The template took too long or too much memory, now or before.
        jinja2.TemplateError: The template refuses the messages, or is broken (TemplateSyntaxError).
    """
    if not messages or _is_known(source) or not _renders_with_jinja(tokenizer):
        return tokenizer.apply_chat_template(list(messages), chat_template=source, tokenize=False, **switches)
    return sandbox().render(source, messages, {**tokenizer.special_tokens_map, **switches})


@functools.lru_cache(maxsize=64)
def _is_known(source: str) -> bool:
    return hashlib.sha256(source.encode("utf-8")).hexdigest() in KNOWN


def _renders_with_jinja(tokenizer: Any) -> bool:
    """Some tokenizers (mistral-common's) have a method of their own, which does not look at the template."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template


@functools.cache
def sandbox() -> TemplateSandbox:
    """The one child of this process; it starts when the first unknown template is rendered."""
    return TemplateSandbox()


class TemplateSandbox:
    """A child process that renders one template at a time. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._buffer = b""
        self._refused: dict[str, str] = {}

    def render(self, source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]) -> str:
        """As `render`; `variables` are the template's."""
        from jinja2 import TemplateError, TemplateSyntaxError

        with self._lock:
            if source in self._refused:  # not once more for each of a million rows
                raise UserError(self._refused[source])
            request = {"source": source, "messages": list(messages), "variables": dict(variables)}
            reply = self._ask(request)
            if "limit" in reply:
                self._refused[source] = _refusal(reply["limit"])
                raise UserError(self._refused[source])
        if "line" in reply:
            raise TemplateSyntaxError(reply["error"], reply["line"])
        if "error" in reply:
            raise TemplateError(reply["error"])
        return reply["text"]

    def close(self) -> None:
        """End the child; the next rendering starts another."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with suppress(OSError):
                    pipe.close()
        self._process, self._buffer = None, b""

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The child's reply; a child that is late or dead is a limit that was reached."""
        data = json.dumps(request, default=str).encode() + b"\n"
        try:
            process = self._started()
            assert process.stdin is not None
            process.stdin.write(data)
            process.stdin.flush()
            reply = self._receive(time.monotonic() + SECONDS, len(data))
        except BrokenPipeError:
            reply = None
        if reply is None:
            code = self._process.poll() if self._process else None
            self.close()
            return {"limit": f"took longer than {SECONDS:g} s" if code is None else f"ended its process (code {code})"}
        return reply

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        paths = [str(PACKAGE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        kept = {
            name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_PREFIXES)
        }
        limits = [str(SECONDS), str(MEMORY), str(MOST_CHARACTERS)]
        # -P: the folder in which the user stands must not shadow a library in the child.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "unsloth_factory.data.template_child", *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        )
        if self._receive(time.monotonic() + START_SECONDS, 0) is None:
            code = self._process.poll()
            self.close()
            raise UserError(f"The process that renders chat templates does not start (exit code {code}).")
        return self._process

    def _receive(self, deadline: float, request_bytes: int) -> dict[str, Any] | None:
        """One line of JSON; None when the child is late, dead, or sends more than any rendering can be."""
        assert self._process is not None
        assert self._process.stdout is not None
        most = 8 * (MOST_CHARACTERS + request_bytes)
        while b"\n" not in self._buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._process.stdout], [], [], remaining)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 1 << 20)
            if not data:
                self._process.wait()
                return None
            self._buffer += data
            if len(self._buffer) > most:
                return None
        line, self._buffer = self._buffer.split(b"\n", 1)
        return json.loads(line)


def _refusal(limit: str) -> str:
    return (
        f"The model's chat template {limit} for one conversation and was stopped: it is broken or hostile. Give "
        "another one: --chat_template chatml, or --chat_template FILE.jinja."
    )
