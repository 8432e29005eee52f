"""No test leaves this machine: connections and name look-ups beyond the loopback fail, and are written down.

Python imports this file at its start when its folder is on PYTHONPATH (tests/conftest.py puts it there), so that the
processes which tests start are guarded as well.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
from typing import Any

LOG = "UNSLOTH_FACTORY_NETWORK_LOG"
NAMES = {"", "localhost", "localhost.localdomain", "ip6-localhost"}


def is_local(host: Any) -> bool:
    """Whether a host is this machine."""
    text = host.decode("ascii", "replace") if isinstance(host, bytes) else str("" if host is None else host)
    if text.lower() in NAMES or text == socket.gethostname():
        return True
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(text.split("%")[0])
        return address.is_loopback or address.is_unspecified
    return False


def refuse(what: str) -> None:
    """Write the attempt down and fail it."""
    if path := os.environ.get(LOG):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{what}\n")
    raise OSError(errno.ENETUNREACH, f"the test suite has no network: {what}")


def install() -> None:
    """Put the guard around Python's sockets, once."""
    if getattr(socket, "guarded_by_the_tests", False):
        return
    socket.guarded_by_the_tests = True  # type: ignore[attr-defined]

    def guard_address(name: str, position: int) -> None:
        original = getattr(socket.socket, name)

        def call(self: socket.socket, *args: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and not is_local(args[position][0]):
                refuse(f"{name} {args[position]}")
            return original(self, *args)

        setattr(socket.socket, name, call)

    guard_address("connect", 0)
    guard_address("connect_ex", 0)
    guard_address("sendto", -1)
    for name in ("getaddrinfo", "gethostbyname"):
        original = getattr(socket, name)

        def look_up(host: Any, *args: Any, _original: Any = original, _name: str = name, **options: Any) -> Any:
            if not is_local(host) and not _is_address(host):
                refuse(f"{_name} {host!r}")
            return _original(host, *args, **options)

        setattr(socket, name, look_up)


def _is_address(host: Any) -> bool:
    try:
        ipaddress.ip_address(str(host).split("%")[0])
    except ValueError:
        return False
    return True


install()
