"""SIGTERM and Ctrl-C: finish the step, save, leave."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Protocol


class StopRequest(Protocol):
    """Asked between two pieces of work."""

    @property
    def received(self) -> int | None:
        """None to go on; else the number of the signal, or 0 for another reason to stop."""
        ...


class StopSignals:
    """Within it the first SIGINT or SIGTERM only sets `received`; a second one leaves at once.

    Outside the main thread Python cannot handle signals; nothing is changed there.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.received: int | None = None
        self._say = say
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.received = number
        name = signal.Signals(number).name
        self._say(f"{name}: finishing this step and saving; {'Ctrl-C' if number == signal.SIGINT else name} again "
                  "leaves at once without saving")  # fmt: skip
