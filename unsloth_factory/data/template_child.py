"""The child process that renders chat templates; started by `template_sandbox`.

Arguments: seconds for one rendering, bytes of memory beyond its own, characters of the longest text.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

MESSAGE_CHARACTERS = 2000


def main() -> None:
    """Answer one request a line until stdin closes."""
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory(memory)
    _send(channel, {"ready": True})
    for line in sys.stdin.buffer:
        request = json.loads(line)
        # Nobody waits longer. The signal's default ends the process, in the middle of C code as well.
        signal.setitimer(signal.ITIMER_REAL, 1.5 * seconds)
        try:
            rendered: Any = render_jinja_template(
                [request["messages"]], chat_template=request["source"], **request["variables"]
            )
            text = rendered[0][0]
            reply: dict[str, Any] = {"text": text}
            if len(text) > characters + len(line):
                reply = {"limit": f"makes a text of {len(text)} characters"}
        except MemoryError:
            reply = {"limit": f"needs more than {memory / 2**20:.0f} MiB of memory"}
        except TemplateSyntaxError as error:
            reply = {"error": str(error.message)[:MESSAGE_CHARACTERS], "line": error.lineno}
        except Exception as error:  # a template is a program: anything may come out of it
            reply = {"error": (str(error) or type(error).__name__)[:MESSAGE_CHARACTERS]}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(channel, reply)


def _send(channel: Any, reply: dict[str, Any]) -> None:
    channel.write(json.dumps(reply).encode() + b"\n")
    channel.flush()


def _limit_memory(memory: int) -> None:
    """Address space: what is mapped now and `memory` bytes more."""
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        mapped = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + memory, mapped + memory))


if __name__ == "__main__":
    main()
