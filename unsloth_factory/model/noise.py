"""Keep the libraries' known chatter off the terminal; every warning that is not on the list still shows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# logger -> beginnings of messages that say nothing a user could act on.
KNOWN_CHATTER: dict[str, tuple[str, ...]] = {
    # bitsandbytes looks for an optional CPU kernel on the hub; we keep the portable one on purpose (standard.py).
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


class _Drop(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it transformers draws no progress bars and the known messages are dropped; then all is as before."""
    from transformers.utils import logging as transformers_logging

    filters = {name: _Drop(beginnings) for name, beginnings in KNOWN_CHATTER.items()}
    for name, item in filters.items():
        logging.getLogger(name).addFilter(item)
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        for name, item in filters.items():
            logging.getLogger(name).removeFilter(item)
