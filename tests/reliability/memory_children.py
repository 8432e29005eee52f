"""Trainings in children that the kernel stops or limits: memory_children.py MODEL FOLDER. Prints one line of JSON.

The libraries are imported once; each training is a fork. No tensor operation runs before a fork: a child forked after
OpenMP has started its threads may hang.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))
import peft  # noqa: E402, F401 (imported here, not once more in every child)
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401
from rich.console import Console  # noqa: E402
from training_jobs import load, make_job, samples  # noqa: E402

from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.config.settings import RunSettings  # noqa: E402
from unsloth_factory.run.atomic import sha256  # noqa: E402
from unsloth_factory.run.folder import RunFolder  # noqa: E402
from unsloth_factory.training import loop as loop_module  # noqa: E402
from unsloth_factory.training.checkpoints.store import claim  # noqa: E402
from unsloth_factory.training.methods import Sft  # noqa: E402


class Killed(Sft):
    """The kernel ends the process in the middle of its n-th micro-batch."""

    def __init__(self, call: int) -> None:
        self.left = call

    def loss(self, loaded: Any, batch: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(loaded, batch)


class Limited(Sft):
    """Has so many bytes of address space more than when its first loss began; 0 sets no limit."""

    def __init__(self, room: int) -> None:
        self.room = room

    def loss(self, loaded: Any, batch: Any) -> Any:
        if self.room:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            size = pages * resource.getpagesize() + self.room
            resource.setrlimit(resource.RLIMIT_AS, (size, size))
            self.room = 0
        return super().loss(loaded, batch)


def training(model: Path, folder: Path, method: Sft, **changes: Any) -> Callable[[], int]:
    def run() -> int:
        loop_module.plot_loss = lambda *_: None
        with claim(RunFolder(folder), RunSettings(resume="auto", save_steps=2, logging_steps=1), print) as store:
            job = make_job(folder, load(model), store, method=method, console=Console(width=250), **changes)
            loop_module.train(job)
        return 0

    return run


def child(work: Callable[[], int], log: Path) -> str:
    """How it ended: "exit 0", or "killed, signal 9"."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
            code = work()
        except UserError as error:
            print(f"UserError: {error}")
            code = error.exit_code
        finally:
            sys.stdout.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return f"killed, signal {-code}" if code < 0 else f"exit {code}"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def main(model: Path, root: Path) -> dict[str, Any]:
    long = {"train_items": samples(24, longest=400), "loop": {"batch_size": 12, "max_steps": 1}}
    ends = {}
    for name, method, changes in (
        ("straight", Sft(), {}),
        ("killed", Killed(11), {}),
        ("killed again", Sft(), {}),
        ("roomy", Limited(0), long),
        ("limited", Limited(20 * 2**20), long),
    ):
        folder = root / name.removesuffix(" again")
        ends[name] = child(training(model, folder, method, **changes), root / f"{name}.txt")
    adapters = [sha256(root / name / "final_adapter/adapter_model.safetensors") for name in ("straight", "killed")]
    return {
        "ends": ends,
        "same_bits": adapters[0] == adapters[1],
        "losses": {name: losses(root / name) for name in ("straight", "killed", "roomy", "limited")},
        "said": {name: (root / f"{name}.txt").read_text() for name in ends},
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))), flush=True)
