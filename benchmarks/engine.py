"""QLoRA of 8B shapes under a memory cap: this project's engines and its rivals, a process each, on the same length mix.

    python benchmarks/engine.py make  /tmp/qwen3-8b              # random weights, 16 GB; or qwen2-7b, llama-3.1-8b
    python benchmarks/engine.py uf    /tmp/qwen3-8b /tmp/runs --engine fast --mix mean900 --cap 14.5
    python benchmarks/engine.py peer  /tmp/qwen3-8b /tmp/runs --rival unsloth --cap 14.5   # or liger, transformers
    python benchmarks/engine.py load    /tmp/qwen3-8b /tmp/runs --rival fast --cap 14.2    # time to first step, RAM
    python benchmarks/engine.py lengths /tmp/qwen3-8b /tmp/runs --rival fast --cap 14.2 --layers 36,9,18,27
    python benchmarks/engine.py plot  results.jsonl              # of `lengths` -> docs/engine-lengths.png, a table
    python benchmarks/engine.py table results.jsonl              # also into benchmarks/results/engine.json

A mix is log-normal (mean 900, median 700, clipped to 64..4,096 tokens; or mean 200, 16..1,024), half of each sample
trained, 32 samples an optimizer step, LoRA r = 16 on all linear layers, AdamW 8 bit. `uf` runs the real command and
reads its metrics.jsonl: real tokens a second, the median of the second half of the steps, and those over wall time.
`peer` runs another library's model on whole rows without any padding or borders between documents, which flatters it,
and on batches of the mixes padded to their longest sample, of which the real tokens count; with its checkpointing, or
without (--setting none). Each is warmed up until three windows agree within 2 %, their median counts. `load` and
`lengths` (engine_lengths.py) load once and measure one sequence of each length, ours and theirs. --dtype float16 is
what cards without bfloat16 train in. Figures only compare within one run of the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import engine_lengths, engine_plot, loop_profile  # noqa: E402
from benchmarks.engine_models import TINY, make  # noqa: E402
from benchmarks.engine_rivals import (  # noqa: E402
    OURS,
    THEIRS,
    Peer,
    cap,
    driver_gib,
    empty,
    finish,
    import_libraries,
    peaks,
    report,
)

SAMPLES = 32
MIXES = {"mean900": (900, 64, 4096), "mean200": (200, 16, 1024), "exactly900": (900, 900, 900)}
ROWS = {"checkpointing": ((1, 900), (1, 4096), (2, 2048), (4, 2048)), "none": ((1, 512), (1, 900), (1, 1536))}
UNPACKED = {"mean900": (1, 2, 4), "mean200": (4, 8, 16)}
"""Samples of a padded batch of a peer."""
MOST_WINDOWS = 12


def mix(name: str, count: int, seed: int = 3407) -> list[int]:
    """Sample lengths in tokens."""
    mean, low, high = MIXES[name]
    chooser = random.Random(seed)
    sigma = math.sqrt(2 * math.log(900 / 700))
    draws = (chooser.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma) for _ in range(count))
    return [min(high, max(low, round(draw))) for draw in draws]


def write_data(path: Path, lengths: list[int]) -> None:
    """Rows of about these lengths, half of each the answer."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    chooser = random.Random(3407)
    frame = 16  # what the chat template adds

    def text(tokens: int) -> str:
        words = "".join(chr(chooser.randrange(0x4E00, 0x5E00)) for _ in range(tokens))
        return tokenizer.decode(tokenizer.encode(words).ids[: max(1, tokens)]).replace("\ufffd", "")

    with open(path, "w", encoding="utf-8") as file:
        for length in lengths:
            row = {"instruction": text(length // 2 - frame), "output": text(length // 2)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def uf(given: argparse.Namespace) -> None:
    """`uf sft` on a mix; leaves when the last step is in metrics.jsonl."""
    import shutil

    from unsloth_factory.cli import main

    given.runs.mkdir(parents=True, exist_ok=True)
    data, run = given.runs / f"{given.mix}.jsonl", given.runs / f"{given.engine}-{given.mix}"
    shutil.rmtree(run, ignore_errors=True)
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**50, 0, 2**50)  # type: ignore[assignment,attr-defined]
    write_data(data, mix(given.mix, given.steps * SAMPLES))
    cap(given.cap)
    started = time.time()
    threading.Thread(target=_watch, args=(given, run, started), daemon=True).start()
    words = ["sft", "--model", str(given.model), "--dataset", str(data), "--output_dir", str(run)]
    words += ["--engine", given.engine, "--quantization_bit", "4", "--lora_r", "16", "--optimizer", "adamw_8bit"]
    words += ["--batch_size", str(given.batch_size), "--accumulation_steps", str(SAMPLES // given.batch_size)]
    words += ["--low_memory"] if given.low_memory else []
    words += ["--matmul", given.matmul] if given.matmul != "exact" else []
    words += ["--dtype", given.dtype] if given.dtype != "auto" else []
    words += ["--max_seq_length", "4096", "--max_steps", str(given.steps), "--val_split", "0"]
    sys.exit(main([*words, "--logging_steps", "1", "--save_steps", "1000", "--save_total_limit", "1"]))


def _watch(given: argparse.Namespace, run: Path, started: float) -> None:
    import torch

    path = run / "metrics.jsonl"

    def steps() -> int:
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    seen: list[float] = []  # when each step was done
    while steps() < given.steps:
        time.sleep(0.01)
        seen += [time.time()] * (steps() - len(seen))
        if given.profile and steps() == given.steps - 4:
            print(json.dumps(loop_profile.watch(lambda: steps() == given.steps - 1), indent=1), flush=True)
    seen += [time.time()] * (given.steps - len(seen))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    speeds = [line["tokens_per_second"] for line in lines]
    half = given.steps // 2  # by then most sizes of micro-batches have been met, and their graphs made
    overall = sum(line["tokens"] for line in lines[half:]) / (seen[-1] - seen[half - 1])
    report(
        model=given.model.name, rival=given.engine, mix=given.mix, cap_gib=given.cap,
        setting=f"--batch_size {given.batch_size}" + " --low_memory" * given.low_memory
        + f" --matmul {given.matmul}" * (given.matmul != "exact"), dtype=given.dtype,
        tokens_per_second=round(statistics.median(speeds[half:])), speeds=[round(speed) for speed in speeds],
        second_half_wall=round(overall),
        peak_gib=round(torch.cuda.max_memory_reserved() / 2**30, 2), driver_gib=driver_gib(),
        first_step_s=round(seen[0] - started, 1),
    )  # fmt: skip
    os._exit(0)


def peer(given: argparse.Namespace) -> None:
    """Another library's model on whole rows."""
    if given.rival in OURS:
        sys.exit(f"--rival {given.rival}: `uf` measures this project's engines")
    import_libraries(given.rival)
    import torch

    cap(given.cap)
    started = time.time()
    rival = Peer(given)
    loaded = time.time() - started
    for name, lengths, rows in _work(given):
        facts = {"model": given.model.name, "rival": given.rival, "mix": name, "cap_gib": given.cap,
                 "setting": rival.setting, "dtype": str(rival.dtype).removeprefix("torch.")}  # fmt: skip
        try:
            speed, windows = _peer_speed(rival, lengths, rows)
            report(
                **facts, tokens_per_second=speed, speeds=windows, peak_gib=peaks()["peak_gib"],
                driver_gib=driver_gib(), load_s=round(loaded, 1), computed=rival.computed,
            )  # fmt: skip
        except torch.OutOfMemoryError as error:
            report(**facts, error=str(error)[:120])
        rival.clean()


def _work(given: argparse.Namespace) -> Iterator[tuple[str, list[int], int]]:
    """(what it is called, lengths of the samples of a window, samples of a micro-batch)."""
    for rows, tokens in ROWS[given.setting]:
        yield f"whole rows, {rows} x {tokens}", [tokens] * (8 * rows), rows
    for name, sizes in {} if given.whole_rows else UNPACKED.items():
        for rows in sizes:
            yield f"{name}, padded batches of {rows}", mix(name, SAMPLES), rows


def _peer_speed(rival: Peer, lengths: list[int], rows: int) -> tuple[int, list[int]]:
    """(median of the last three windows, all windows) in real tokens a second.

    A window is one optimizer step over the samples; windows are run until three in a row agree within 2 %.
    """
    empty()
    speeds: list[int] = []
    while len(speeds) < MOST_WINDOWS:
        started = time.time()
        for start in range(0, len(lengths), rows):
            rival.micro_batch(lengths[start : start + rows])
        rival.update()
        finish()
        speeds.append(round(sum(lengths) / (time.time() - started)))
        if len(speeds) > 3 and max(speeds[-3:]) < 1.02 * min(speeds[-3:]):
            break
    return round(statistics.median(speeds[-3:])), speeds


def table(paths: list[Path]) -> None:
    """Append to benchmarks/results/engine.json what is not in it yet, and print the figures as a Markdown table."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    target = ROOT / "benchmarks" / "results" / "engine.json"
    target.parent.mkdir(exist_ok=True)
    known = json.loads(target.read_text()) if target.is_file() else []
    known += [line for line in lines if line not in known]
    target.write_text(json.dumps(known, indent=1) + "\n")
    print("| rival | setting | mix | cap, GiB | real tokens/s | peak, GiB |\n|---|---|---|---|---|---|")
    for line in lines:
        cells = [line.get(key, "-") for key in ("rival", "setting", "mix", "cap_gib", "tokens_per_second", "peak_gib")]
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "uf", "peer", "load", "lengths", "plot", "table"])
    parser.add_argument("model", type=Path, help="folder of the model; for `plot` and `table` a file of results")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("/tmp/engine"))
    parser.add_argument("--engine", default="fast")
    parser.add_argument("--mix", default="mean900", choices=sorted(MIXES))
    parser.add_argument("--cap", type=float, help="GiB of the card that the process may use")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of `uf`")
    parser.add_argument("--batch_size", type=int, default=4, help="of `uf`")
    parser.add_argument("--low_memory", action="store_true", help="of `uf`, and of the rival `fast`")
    parser.add_argument("--matmul", default="exact", choices=["exact", "fp8"], help="of `uf`; fp8 is not exact")
    parser.add_argument("--dtype", default="auto", choices=["auto", "bfloat16", "float16"])
    parser.add_argument(
        "--whole_rows", action="store_true", help="of a peer: leave out the padded batches of the mixes"
    )
    parser.add_argument("--profile", action="store_true", help="of `uf`: look into three of the last steps")
    parser.add_argument("--rival", default="unsloth", choices=[*THEIRS, *OURS])
    parser.add_argument("--setting", default="checkpointing", choices=sorted(ROWS), help="of a peer")
    parser.add_argument("--layers", type=_numbers, help="of `make`: how many; of `lengths`: 36,9: 36 first, then 9")
    parser.add_argument("--tokens", type=_numbers, help="of `lengths`: these alone, the longest is not looked for")
    parser.add_argument("--seconds", type=float, default=4.0, help="of `lengths`: most that is measured of a length")
    parser.add_argument(
        "--cold", action="store_true", help="of `load`, `lengths`: with empty caches of compiled kernels"
    )
    parser.add_argument(
        "--recompute", action="store_true", help="of `lengths` with the rival `fast`: also with every layer recomputed"
    )
    return parser


def main() -> None:
    """Run one of the parts."""
    given = parser().parse_args()
    parts: dict[str, Callable[[], None]] = {
        "make": lambda: make(given.model, given.layers[0] if given.layers else None), "uf": lambda: uf(given),
        "peer": lambda: peer(given), "load": lambda: engine_lengths.run(given),
        "lengths": lambda: engine_lengths.run(given), "plot": lambda: engine_plot.run(given.model),
        "table": lambda: table([given.model]),
    }  # fmt: skip
    parts[given.what]()


if __name__ == "__main__":
    main()
