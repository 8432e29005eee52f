"""kill -9 at random instants of trainings of the bundled model; every run must end with the same bits.

Run as a program: python kill_harness.py FOLDER KILLS SEED. It imports the libraries once and forks a child for each
attempt; the parent runs no tensor operation, because a fork after OpenMP has started its threads hangs. Every 20th
attempt goes through the real command line in a process of its own. Prints one line of JSON.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
STEPS, ROWS = 12, 40
REAL_EVERY = 20
PRELOADED = (
    "torch", "peft", "accelerate", "accelerate.tracking", "bitsandbytes", "matplotlib.pyplot", "rich.progress",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto", "torch._dynamo",
    "unsloth_factory.commands.train",
)  # fmt: skip


def arguments(folder: Path, data: Path) -> list[str]:
    """A training of 12 steps that saves at every step: most instants lie in or beside a save."""
    return [
        "sft", "--model", "tiny", "--dataset", str(data), "--output_dir", str(folder), "--resume", "auto",
        "--max_steps", str(STEPS), "--batch_size", "2", "--accumulation_steps", "2", "--max_seq_length", "128",
        "--val_split", "4", "--save_steps", "1", "--eval_steps", "4", "--lora_r", "4", "--lora_dropout", "0.1",
        "--learning_rate", "1e-3", "--optimizer", "adamw", "--epochs", "9",
    ]  # fmt: skip


def write_data(path: Path) -> None:
    """Forty short questions and answers."""
    chooser = random.Random(5)
    rows = [
        {"instruction": f"第{i}号柜里放着什么？", "output": f"第{i}号柜里放着{chooser.randrange(100)}本书。"}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def forked(words: list[str], log: Path) -> int:
    """Start a training in a fork of this process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        from unsloth_factory.cli import main

        code = main(words)
    finally:
        sys.stdout.flush()
        os._exit(code)


def spawned(words: list[str], log: Path) -> int:
    """Start the same training through the real command line; returns its pid."""
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *words], stdout=file, stderr=file)
    return child.pid


def attempt(words: list[str], log: Path, real: bool, kill_after: float | None) -> tuple[str, float]:
    """("done" | "killed" | "failed CODE", seconds) of one training that is killed after so many seconds, if at all."""
    started = time.monotonic()
    pid = spawned(words, log) if real else forked(words, log)
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if found:
            code = os.waitstatus_to_exitcode(status)
            return ("done" if code == 0 else f"failed {code}"), seconds
        if kill_after is not None and seconds >= kill_after:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "killed", seconds
        time.sleep(0.005)


def result(folder: Path) -> dict[str, str]:
    """Hash of the final adapter, and the steps and losses of metrics.jsonl (speeds and times differ, of course)."""
    weights = (folder / "final_adapter" / "adapter_model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = [[line.get(key) for key in ("step", "loss", "lr", "grad_norm", "tokens", "eval_loss")] for line in lines]
    return {"adapter": hashlib.sha256(weights).hexdigest(), "metrics": json.dumps(kept)}


def torture(folder: Path, kills: int, seed: int) -> dict[str, object]:
    """Kill until `kills` attempts have died; every run is then finished and compared with an undisturbed one."""
    for name in PRELOADED:  # so that no child pays for them: what is killed is training, not importing
        importlib.import_module(name)
    chooser = random.Random(seed)
    data, log = folder / "rows.jsonl", folder / "log.txt"
    write_data(data)
    first, fork_seconds = attempt(arguments(folder / "reference", data), log, False, None)
    assert first == "done", f"the undisturbed run: {first}, see {log}"
    again, real_seconds = attempt(arguments(folder / "real", data), log, True, None)
    assert again == "done", f"the undisturbed command: {again}"
    expected = result(folder / "reference")
    assert result(folder / "real") == expected, "two undisturbed runs differ"
    killed = attempts = runs = 0
    wrong: list[str] = []
    while killed < kills:
        runs += 1
        run = folder / f"run-{runs}"
        while True:
            attempts += 1
            real = attempts % REAL_EVERY == 0
            span = real_seconds if real else fork_seconds
            after = chooser.uniform(0, 1.1 * span) if killed < kills else None
            state, _ = attempt(arguments(run, data), log, real, after)
            if state == "killed":
                killed += 1
                continue
            if state != "done" or result(run) != expected:
                wrong.append(f"{run.name}: {state}")
            break
    return {
        "kills": killed,
        "attempts": attempts,
        "runs": runs,
        "wrong": wrong,
        "seconds_a_run": round(fork_seconds, 2),
    }


if __name__ == "__main__":
    print(json.dumps(torture(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))), flush=True)
