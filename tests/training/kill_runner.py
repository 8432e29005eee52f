"""Trains in forked children and sends them signals; test_kills.py runs it: kill_runner.py MODEL FOLDER KILLS.

Prints one line of JSON with what was found. The libraries are imported once; each attempt is a fork. No tensor
operation runs before a fork: a child forked after OpenMP has started its threads may hang.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peft  # noqa: E402, F401 (imported here, not once more in every child)
import transformers.models.qwen3.modeling_qwen3  # noqa: E402, F401
from rich.console import Console  # noqa: E402
from training_jobs import load, make_job  # noqa: E402

from unsloth_factory.config.errors import UserError  # noqa: E402
from unsloth_factory.config.settings import RunSettings, TuningSettings  # noqa: E402
from unsloth_factory.run.atomic import sha256  # noqa: E402
from unsloth_factory.run.folder import RunFolder  # noqa: E402
from unsloth_factory.training.checkpoint import claim  # noqa: E402
from unsloth_factory.training.loop import train  # noqa: E402
from unsloth_factory.training.methods import Sft  # noqa: E402


class Slow(Sft):
    """SFT with a pause in the middle of every step."""

    def loss(self, loaded, batch):
        time.sleep(0.2)
        return super().loss(loaded, batch)


def attempt(model: Path, folder: Path, method: Sft) -> int:
    """One training; returns the exit code of the command line."""
    run = RunSettings(resume="auto", save_steps=1, logging_steps=1)
    tuning = TuningSettings(lora_r=4, lora_dropout=0.1)
    changes = {"tuning": tuning, "method": method, "loop": {"epochs": 3.0}, "console": Console(width=200)}
    try:
        with claim(RunFolder(folder), run, print) as store:
            train(make_job(folder, load(model, tuning), store, **changes))
        return 0
    except UserError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 99


def fork(model: Path, folder: Path, method: Sft) -> int:
    """Process id of a child that trains; what it prints goes to FOLDER.txt."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        sys.stdout = open(f"{folder}.txt", "w", buffering=1)  # noqa: SIM115 (the child ends without cleaning up)
        code = 98
        try:
            code = attempt(model, folder, method)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Its exit code, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_until(condition: Callable[[], bool], child: int) -> None:
    """Return when it holds, or when the child has ended."""
    while not condition() and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.001)


def lines(path: Path) -> int:
    """Lines of a file that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0


def kill_often(model: Path, folder: Path, wanted: int) -> dict[str, Any]:
    """SIGKILL at random instants of steps and saves, then compare with a run that was left alone."""
    assert ended(fork(model, folder / "straight", Sft())) == 0
    generator, kills, metrics = random.Random(5), 0, folder / "killed" / "metrics.jsonl"
    while True:
        done = lines(metrics)
        child = fork(model, folder / "killed", Sft())
        if kills < wanted:
            # a resumed run first cuts the file back by at most one line
            wait_until(lambda done=done: lines(metrics) >= done + 1, child)
            time.sleep(generator.uniform(0, 0.06))
            os.kill(child, signal.SIGKILL)
        status = ended(child)
        kills += status == -signal.SIGKILL
        if status != -signal.SIGKILL:
            break
    result: dict[str, Any] = {"kills": kills, "status": status}
    for name in ("straight", "killed"):
        result[name] = sha256(folder / name / "final_adapter" / "adapter_model.safetensors")
        result[f"{name}_steps"] = lines(folder / name / "metrics.jsonl")
    result["leftovers"] = [p.name for p in (folder / "killed").iterdir() if p.name.startswith((".tmp", ".del"))]
    return result


def stop(model: Path, folder: Path, signals: list[int]) -> dict[str, Any]:
    """Send the first signal in the middle of step 2, each further one as soon as the one before was noticed."""
    text = Path(f"{folder}.txt")
    child = fork(model, folder, Slow())
    signs = (lambda: (folder / "checkpoint-1").exists(), lambda: "finishing this step" in text.read_text())
    for sign, number in zip(signs, signals, strict=False):
        wait_until(sign, child)
        os.kill(child, number)
    status = ended(child)
    saved = sorted(path.name for path in folder.glob("checkpoint-*"))
    final = (folder / "final_adapter").exists()
    return {"status": status, "text": text.read_text(), "saved": saved, "final": final}


def main() -> None:
    """See the module's text."""
    model, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(exist_ok=True)
    result = {
        "kills": kill_often(model, folder, kills),
        "SIGTERM": stop(model, folder / "term", [signal.SIGTERM]),
        "SIGINT": stop(model, folder / "int", [signal.SIGINT]),
        "twice": stop(model, folder / "twice", [signal.SIGINT, signal.SIGINT]),
    }
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
