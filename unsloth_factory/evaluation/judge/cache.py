"""A judge's replies on disk, by a hash of (judge, prompt): what was answered once is never asked again.

One JSON object a line, appended as replies come, so that a stopped judging goes on where it was. A line that a crash
cut off is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unsloth_factory.inference.endpoint import Message, Reply


class ReplyCache:
    """The replies of one judge.

    Args:
        path: JSON lines; made when the first reply is kept.
        judge: Name of the judge model; replies of others in the file are left alone.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self._path, self._judge = path, judge
        self._replies: dict[str, Reply] = {}
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self._torn = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            self._read(line)

    def _read(self, line: str) -> None:
        try:
            kept = json.loads(line)
            counts = (int(kept.get("prompt_tokens", 0)), int(kept.get("completion_tokens", 0)))
            self._replies[str(kept["key"])] = Reply(str(kept["text"]), None, bool(kept.get("finished", True)), *counts)
        except (ValueError, KeyError, TypeError, AttributeError):
            return

    def key(self, messages: Sequence[Message]) -> str:
        """Hash of the judge and the prompt."""
        return hashlib.sha256(json.dumps([self._judge, [dict(m) for m in messages]]).encode()).hexdigest()

    def get(self, key: str) -> Reply | None:
        """The reply kept under a key."""
        return self._replies.get(key)

    def put(self, key: str, reply: Reply) -> None:
        """Keep a reply, at once on disk."""
        self._replies[key] = reply
        line: dict[str, Any] = {"key": key, "judge": self._judge, "text": reply.text, "finished": reply.finished}
        line |= {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(("\n" if self._torn else "") + json.dumps(line, ensure_ascii=True) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._torn = False
