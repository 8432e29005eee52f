"""kill -9 at random instants of trainings of the bundled model; every run must end with the same bits.

Run as a program: python kill_harness.py FOLDER SEED sft=200 dpo=200 qlora=200 extend=40 signals=1. It imports the
libraries once and forks a child for each attempt; the parent runs no tensor operation, because a fork after OpenMP has
started its threads hangs. Every 20th attempt goes through the real command line in a process of its own. Prints one
line of JSON.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
REAL_EVERY = 20
MOST_KILLS = 8  # of one run; then it is left alone, so that many runs come to their end and are compared
PRELOADED = (
    "torch", "peft", "accelerate", "accelerate.tracking", "bitsandbytes", "matplotlib.pyplot", "rich.progress",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.auto.modeling_auto", "torch._dynamo",
    "unsloth_factory.commands.train",
)  # fmt: skip
# A save at every step: most instants lie in or beside one.
COMMON = (
    "--model", "tiny", "--resume", "auto", "--batch_size", "2", "--accumulation_steps", "2", "--max_seq_length", "128",
    "--val_split", "4", "--save_steps", "1", "--eval_steps", "4", "--lora_r", "4", "--lora_dropout", "0.1",
    "--learning_rate", "1e-3", "--optimizer", "adamw", "--sample_generations", "1", "--sample_max_new_tokens", "6",
    "--forgetting", "off",
)  # fmt: skip
TWELVE_STEPS = ("--epochs", "9", "--max_steps", "12")
CASES: dict[str, list[tuple[str, ...]]] = {
    "sft": [("sft", *COMMON, *TWELVE_STEPS)],
    "dpo": [("dpo", *COMMON, *TWELVE_STEPS)],
    "qlora": [("sft", *COMMON, *TWELVE_STEPS, "--quantization_bit", "4")],
    "extend": [
        ("sft", *COMMON, "--data_limit", "24", "--epochs", "1"),
        ("sft", *COMMON, "--data_limit", "24", "--epochs", "1", "--extend_epochs", "1"),
    ],
}
"""Name -> the commands of one run, done one after the other."""


def write_data(folder: Path) -> None:
    """Forty short questions, with an answer each (sft) and with a good and a bad one (dpo)."""
    chooser = random.Random(5)
    questions = [f"第{i}号柜里放着什么？" for i in range(40)]
    answers = [f"第{i}号柜里放着{chooser.randrange(100)}本书。" for i in range(40)]
    rows = [{"instruction": q, "output": a} for q, a in zip(questions, answers, strict=True)]
    pairs = [{"prompt": q, "chosen": a, "rejected": "不知道。"} for q, a in zip(questions, answers, strict=True)]
    for name, lines in (("sft", rows), ("dpo", pairs)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def forked(words: list[str], log: Path, pause: float = 0.0) -> int:
    """Start a training in a fork of this process, with a pause in the middle of every step; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 70
    try:
        from unsloth_factory.cli import main

        if pause:
            _slow_down(pause)
        code = main(words)
    finally:
        sys.stdout.flush()
        os._exit(code)


def _slow_down(pause: float) -> None:
    from unsloth_factory.training.methods import Sft

    plain = Sft.loss

    def loss(self: Any, loaded: Any, batch: Any) -> Any:
        time.sleep(pause)
        return plain(self, loaded, batch)

    Sft.loss = loss  # type: ignore[method-assign]


def spawned(words: list[str], log: Path) -> int:
    """Start the same training through the real command line; returns its pid."""
    with open(log, "a", encoding="utf-8") as file:
        child = subprocess.Popen([sys.executable, str(ROOT / "cli.py"), *words], stdout=file, stderr=file)
    return child.pid


def ended(pid: int) -> int | None:
    """Exit code of a child, minus the number of the signal that killed it, or None while it runs."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


@dataclass
class Run:
    """One run folder, and what is seen of it from outside."""

    folder: Path
    wanted: list[tuple[str, ...]]
    log: Path
    first_step_seconds: list[float] = field(default_factory=list)
    """From the start of a resumed child to its first step, for children that need not import."""
    lost_steps: list[int] = field(default_factory=list)
    """Steps that were done before a kill and had to be done again."""
    in_save: int = 0
    """Kills that left a half-written checkpoint behind."""

    def words(self, phase: int) -> list[str]:
        """The command line of one phase."""
        command = self.wanted[phase]
        data = self.folder.parent / f"{command[0]}.jsonl"
        return [*command, "--dataset", str(data), "--output_dir", str(self.folder)]

    def saved(self) -> tuple[int, int]:
        """(step, size of metrics.jsonl) of the newest checkpoint; (0, 0) without one."""
        steps = [int(path.name.rpartition("-")[2]) for path in self.folder.glob("checkpoint-*")]
        if not steps:
            return 0, 0
        state = json.loads((self.folder / f"checkpoint-{max(steps)}" / "state.json").read_text(encoding="utf-8"))
        return max(steps), state["metrics_bytes"]

    def attempt(self, phase: int, real: bool, kill_after: float | None) -> tuple[str, float]:
        """("done" | "killed" | "failed CODE", seconds) of one command, killed after some seconds if that is given."""
        (step, cut), metrics, seen_cut = self.saved(), self.folder / "metrics.jsonl", False
        started = time.monotonic()
        pid = spawned(self.words(phase), self.log) if real else forked(self.words(phase), self.log)
        waiting = step > 0 and not real
        while True:
            code, seconds = ended(pid), time.monotonic() - started
            if waiting and metrics.exists():
                # the resumed run first cuts the file to its checkpoint's size
                size = metrics.stat().st_size
                if seen_cut and size > cut:
                    self.first_step_seconds.append(seconds)
                    waiting = False
                seen_cut = seen_cut or size <= cut
            if code is not None:
                return ("done" if code == 0 else f"failed {code}"), seconds
            if kill_after is not None and seconds >= kill_after:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self._note_kill()
                return "killed", seconds
            time.sleep(0.003)

    def _note_kill(self) -> None:
        self.in_save += bool(list(self.folder.glob(".tmp-*")))
        metrics = self.folder / "metrics.jsonl"
        done = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self.lost_steps.append(done - self.saved()[0])

    def result(self) -> dict[str, str]:
        """Hash of the final adapter, metrics.jsonl but for speeds and times, and the answers."""
        volatile = ("tokens_per_second", "memory", "time")
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{key: value for key, value in line.items() if key not in volatile} for line in lines]
        answers = self.folder / "generations.jsonl"
        weights = (self.folder / "final_adapter" / "adapter_model.safetensors").read_bytes()
        return {
            "adapter": hashlib.sha256(weights).hexdigest(),
            "metrics": json.dumps(kept),
            "answers": answers.read_text(encoding="utf-8") if answers.exists() else "",
            "leftovers": str([path.name for path in self.folder.glob(".*") if path.name.startswith((".tmp", ".del"))]),
        }


def torture(folder: Path, case: str, kills: int, chooser: random.Random, compare_real: bool) -> dict[str, Any]:
    """Kill until `kills` attempts have died; every run is then finished and compared with an undisturbed one."""
    spans, import_seconds, expected = undisturbed(folder, case, compare_real)
    killed = attempts = 0
    wrong: list[str] = []
    runs: list[Run] = []
    while killed < kills:
        run, phase = Run(folder / f"{case}-{len(runs) + 1}", CASES[case], folder / f"{case}.log"), 0
        runs.append(run)
        state = ""
        while phase < len(CASES[case]) and not state.startswith("failed"):
            attempts += 1
            real = compare_real and attempts % REAL_EVERY == 0
            span = spans[phase] + (import_seconds if real else 0.0)
            spared = killed == kills or len(run.lost_steps) == MOST_KILLS
            state, _ = run.attempt(phase, real, None if spared else chooser.uniform(0, 1.1 * span))
            killed += state == "killed"
            phase += state == "done"
        if state != "done" or run.result() != expected:
            wrong.append(f"{run.folder.name}: {state}")
    resumed = sorted(seconds for run in runs for seconds in run.first_step_seconds)
    return {
        "kills": killed,
        "in_save": sum(run.in_save for run in runs),
        "attempts": attempts,
        "runs": len(runs),
        "wrong": wrong,
        "most_steps_lost": max(steps for run in runs for steps in run.lost_steps),
        "resumes_timed": len(resumed),
        "first_step_median": round(resumed[len(resumed) // 2], 2) if resumed else None,
        "first_step_worst": round(resumed[-1], 2) if resumed else None,
        "seconds_a_run": round(sum(spans), 2),
    }


def undisturbed(folder: Path, case: str, compare_real: bool) -> tuple[list[float], float, dict[str, str]]:
    """(seconds of each phase, further seconds of the real command, result) of a run that is left alone."""
    log, phases = folder / f"{case}.log", range(len(CASES[case]))
    reference = Run(folder / f"{case}-reference", CASES[case], log)
    done = [reference.attempt(phase, False, None) for phase in phases]
    assert {state for state, _ in done} == {"done"}, f"the undisturbed {case} run: {done}\n{log.read_text()[-2000:]}"
    spans, expected = [seconds for _, seconds in done], reference.result()
    if not compare_real:
        return spans, 0.0, expected
    real_run = Run(folder / f"{case}-real", CASES[case], log)
    real = [real_run.attempt(phase, True, None) for phase in phases]
    assert {state for state, _ in real} == {"done"}, f"the undisturbed commands: {real}"
    assert real_run.result() == expected, f"two undisturbed {case} runs differ"
    return spans, max(0.0, real[0][1] - spans[0]), expected


def wait_until(condition: Callable[[], bool], pid: int) -> None:
    """Return when it holds, or when the child has ended."""
    while not condition() and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)


def stop(folder: Path, name: str, signals: list[int]) -> dict[str, Any]:
    """Send the first signal in the middle of step 2, each further one as soon as the one before was noticed."""
    run = Run(folder / name, CASES["sft"], folder / f"{name}.log")
    pid = forked(run.words(0), run.log, pause=0.2)
    signs = (lambda: (run.folder / "checkpoint-1").exists(), lambda: "finishing this step" in run.log.read_text())
    for sign, number in zip(signs, signals, strict=False):
        wait_until(sign, pid)
        os.kill(pid, number)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    saved = sorted(path.name for path in run.folder.glob("checkpoint-*"))
    final = (run.folder / "final_adapter").exists()
    return {"status": status, "text": run.log.read_text(encoding="utf-8"), "saved": saved, "final": final}


def stop_late(folder: Path) -> dict[str, Any]:
    """SIGTERM to the real command when all is written and the process is about to end."""
    run = Run(folder / "late", [("sft", *COMMON, "--max_steps", "1")], folder / "late.log")
    pid = spawned(run.words(0), run.log)
    wait_until(lambda: "Next: uf validate" in run.log.read_text(encoding="utf-8"), pid)
    time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    return {"status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def main() -> None:
    """See the module's text."""
    for name in PRELOADED:  # so that no child pays for them: what is killed is training, not importing
        importlib.import_module(name)
    folder, chooser = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
    wanted = {case: int(number) for case, _, number in (word.partition("=") for word in sys.argv[3:])}
    write_data(folder)
    found: dict[str, Any] = {}
    if wanted.pop("signals", 0):
        found["SIGTERM"] = stop(folder, "term", [signal.SIGTERM])
        found["SIGINT"] = stop(folder, "int", [signal.SIGINT])
        found["twice"] = stop(folder, "twice", [signal.SIGINT, signal.SIGINT])
        found["late"] = stop_late(folder)
    for case, kills in wanted.items():
        started = time.monotonic()
        found[case] = torture(folder, case, kills, chooser, case == "sft" or kills >= 2 * REAL_EVERY)
        found[case]["seconds"] = round(time.monotonic() - started)
        print(case, json.dumps(found[case]), file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
