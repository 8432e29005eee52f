"""`uf ARGUMENTS` on a machine whose speed changes at every step: python noisy_training.py SEED ARGUMENTS.

A step or evaluation that takes t seconds takes t * u / 0.7 instead, with u drawn from U(0.7, 1.5) each time: the same
as a base speed times that noise, because nothing can be made faster than it is.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from unsloth_factory.cli import main  # noqa: E402


def noisy(work: Callable[..., Any], noise: random.Random) -> Callable[..., Any]:
    """The same work, some time later."""

    def slowed(*arguments: Any, **named: Any) -> Any:
        started = time.monotonic()
        result = work(*arguments, **named)
        time.sleep((time.monotonic() - started) * (noise.uniform(0.7, 1.5) / 0.7 - 1))
        return result

    return slowed


if __name__ == "__main__":
    from unsloth_factory.training import loop
    from unsloth_factory.training.watch import held_out

    noise = random.Random(int(sys.argv[1]))
    loop.run_step = noisy(loop.run_step, noise)
    held_out.look = noisy(held_out.look, noise)
    sys.argv = ["uf", *sys.argv[2:]]
    raise SystemExit(main())
