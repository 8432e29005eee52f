"""QLoRA of 8B shapes under a memory cap: this project's engines and its rivals, a process each, on the same length mix.

    python benchmarks/engine.py make  /tmp/qwen3-8b              # random weights, 16 GB; or qwen2-7b, llama-3.1-8b
    python benchmarks/engine.py uf    /tmp/qwen3-8b /tmp/runs --engine fast --mix mean900 --cap 14.5
    python benchmarks/engine.py peer  /tmp/qwen3-8b /tmp/runs --rival unsloth --cap 14.5   # or liger, transformers
    python benchmarks/engine.py table results.jsonl              # -> benchmarks/results/engine.json, a table

A mix is log-normal (mean 900, median 700, clipped to 64..4,096 tokens; or mean 200, 16..1,024), half of each sample
trained, 32 samples an optimizer step, LoRA r = 16 on all linear layers, AdamW 8 bit. `uf` runs the real command and
reads its metrics.jsonl: real tokens a second, the median of the second half of the steps, and those over wall time.
`peer` runs another library's model on whole rows without any padding or borders between documents, which flatters it,
and on batches of the mixes padded to their longest sample, of which the real tokens count; with its checkpointing, or
without (--setting none). Each is warmed up until three windows agree within 2 %, their median counts. Figures only
compare within one run of the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import loop_profile  # noqa: E402

TINY = ROOT / "unsloth_factory" / "assets" / "tiny_model"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAMPLES = 32
MIXES = {"mean900": (900, 64, 4096), "mean200": (200, 16, 1024), "exactly900": (900, 900, 900)}
ROWS = {"checkpointing": ((1, 900), (1, 4096), (2, 2048), (4, 2048)), "none": ((1, 512), (1, 900), (1, 1536))}
UNPACKED = {"mean900": (1, 2, 4), "mean200": (4, 8, 16)}
"""Samples of a padded batch of a peer."""
MOST_WINDOWS = 12


QWEN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": QWEN_ROPE | {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    },
    "qwen2-7b": QWEN_ROPE | {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
}  # fmt: skip


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


def cap(gib: float | None) -> None:
    """Let this process use no more of the card."""
    import torch

    if gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def driver_gib() -> float:
    """Memory of the card that is taken, but not by torch's allocator: the CUDA context, kernels, graphs."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)


def report(**figures: Any) -> None:
    """One line of JSON, also into $OUT/engine.jsonl."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth")
    found = {name: version(name) for name in packages if find_spec(name)}
    line = json.dumps(figures | {"gpu": gpu, "date": time.strftime("%Y-%m-%d"), "versions": found})
    print(line, flush=True)
    with open(Path(os.environ.get("OUT", ".")) / "engine.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


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
        setting=f"--batch_size {given.batch_size}" + " --low_memory" * given.low_memory,
        tokens_per_second=round(statistics.median(speeds[half:])), speeds=[round(speed) for speed in speeds],
        second_half_wall=round(overall),
        peak_gib=round(torch.cuda.max_memory_reserved() / 2**30, 2), driver_gib=driver_gib(),
        first_step_s=round(seen[0] - started, 1),
    )  # fmt: skip
    os._exit(0)


def make(folder: Path) -> None:
    """A model folder named as one of `SHAPES`, with random weights and the bundled tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.plan_accuracy import write_weights

    if (folder / "model.safetensors").is_file():
        return
    values = {"max_position_embeddings": 40960, "bos_token_id": None, "eos_token_id": 2, "tie_word_embeddings": False}
    config = AutoConfig.for_model(**values | SHAPES[folder.name], dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    for path in TINY.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, folder)
    write_weights(folder / "model.safetensors", {name: list(p.shape) for name, p in model.named_parameters()})


def load_unsloth(given: argparse.Namespace) -> Any:
    """Unsloth's model, as its notebooks set it up."""
    import torch
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(given.model), max_seq_length=8192, dtype=torch.bfloat16, load_in_4bit=True, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407,
        use_gradient_checkpointing="unsloth" if given.setting == "checkpointing" else False,
    )  # fmt: skip


def load_transformers(given: argparse.Namespace) -> Any:
    """Transformers + peft + bitsandbytes as LLaMA-Factory sets them up, with Liger's kernels for the rival "liger"."""
    import peft
    import torch
    import transformers

    if given.rival == "liger":
        import liger_kernel.transformers as liger

        kind = json.loads((given.model / "config.json").read_text())["model_type"]
        getattr(liger, f"apply_liger_kernel_to_{kind}")()
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        given.model, quantization_config=bits, dtype=torch.bfloat16, device_map={"": 0}, attn_implementation="sdpa"
    )
    model.enable_input_require_grads()
    if given.setting == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)


def peer(given: argparse.Namespace) -> None:
    """Another library's model on whole rows."""
    if given.rival == "unsloth":
        import unsloth  # noqa: F401  first of all: it patches what is imported later
    import bitsandbytes
    import torch

    cap(given.cap)
    started = time.time()
    model = (load_unsloth if given.rival == "unsloth" else load_transformers)(given)
    model.train()
    loaded = time.time() - started
    optimizer = bitsandbytes.optim.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for name, lengths, rows in _work(given):
        facts = {"model": given.model.name, "rival": given.rival, "mix": name, "cap_gib": given.cap,
                 "setting": f"checkpointing: {given.setting}"}  # fmt: skip
        try:
            speed, windows = _peer_speed(model, optimizer, lengths, rows)
            peak = round(torch.cuda.max_memory_reserved() / 2**30, 2)
            report(
                **facts,
                tokens_per_second=speed,
                speeds=windows,
                peak_gib=peak,
                driver_gib=driver_gib(),
                load_s=round(loaded, 1),
            )
        except torch.OutOfMemoryError as error:
            report(**facts, error=str(error)[:120])
        optimizer.zero_grad(set_to_none=True)


def _work(given: argparse.Namespace) -> Iterator[tuple[str, list[int], int]]:
    """(what it is called, lengths of the samples of a window, samples of a micro-batch)."""
    for rows, tokens in ROWS[given.setting]:
        yield f"whole rows, {rows} x {tokens}", [tokens] * (8 * rows), rows
    for name, sizes in {} if given.whole_rows else UNPACKED.items():
        for rows in sizes:
            yield f"{name}, padded batches of {rows}", mix(name, SAMPLES), rows


def _peer_speed(model: Any, optimizer: Any, lengths: list[int], rows: int) -> tuple[int, list[int]]:
    """(median of the last three windows, all windows) in real tokens a second.

    A window is one optimizer step over the samples; windows are run until three in a row agree within 2 %.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    speeds: list[int] = []
    while len(speeds) < MOST_WINDOWS:
        started = time.time()
        for start in range(0, len(lengths), rows):
            _micro_batch(model, lengths[start : start + rows])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        speeds.append(round(sum(lengths) / (time.time() - started)))
        if len(speeds) > 3 and max(speeds[-3:]) < 1.02 * min(speeds[-3:]):
            break
    return round(statistics.median(speeds[-3:])), speeds


def _micro_batch(model: Any, lengths: list[int]) -> None:
    """Forward and backward pass of samples padded to the longest of them, half of each trained."""
    import torch

    ids = torch.randint(0, 120_000, (len(lengths), max(lengths)))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        labels[row, length // 2 : length] = ids[row, length // 2 : length]
    ids, mask, labels = (x.to("cuda", non_blocking=True) for x in (ids, mask, labels))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=labels, attention_mask=mask).loss
    loss.backward()


def table(paths: list[Path]) -> None:
    """Write benchmarks/results/engine.json and print the figures as a Markdown table."""
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    target = ROOT / "benchmarks" / "results" / "engine.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(lines, indent=1) + "\n")
    print("| rival | setting | mix | cap, GiB | real tokens/s | peak, GiB |\n|---|---|---|---|---|---|")
    for line in lines:
        cells = [line.get(key, "-") for key in ("rival", "setting", "mix", "cap_gib", "tokens_per_second", "peak_gib")]
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |")


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "uf", "peer", "table"])
    parser.add_argument("model", type=Path, help="folder of the model; for `table` a file of results")
    parser.add_argument("runs", type=Path, nargs="?", default=Path("/tmp/engine"))
    parser.add_argument("--engine", default="fast")
    parser.add_argument("--mix", default="mean900", choices=sorted(MIXES))
    parser.add_argument("--cap", type=float, help="GiB of the card that the process may use")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of `uf`")
    parser.add_argument("--batch_size", type=int, default=4, help="of `uf`")
    parser.add_argument("--low_memory", action="store_true", help="of `uf`")
    parser.add_argument(
        "--whole_rows", action="store_true", help="of a peer: leave out the padded batches of the mixes"
    )
    parser.add_argument("--profile", action="store_true", help="of `uf`: look into three of the last steps")
    parser.add_argument("--rival", default="unsloth", choices=["unsloth", "liger", "transformers"])
    parser.add_argument("--setting", default="checkpointing", choices=sorted(ROWS), help="of a peer")
    given = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "make": lambda: make(given.model), "uf": lambda: uf(given), "peer": lambda: peer(given),
        "table": lambda: table([given.model]),
    }  # fmt: skip
    parts[given.what]()


if __name__ == "__main__":
    main()
