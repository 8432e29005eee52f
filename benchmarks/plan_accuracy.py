"""`uf plan` against measurement: random weights of Qwen3 shapes, each configuration a process of its own.

    python benchmarks/plan_accuracy.py make  /tmp/models 1.7B 4B 8B     # 28 GB on disk, no GPU needed
    python benchmarks/plan_accuracy.py run   /tmp/models /tmp/runs [NAME ...]   # measures, and compares with the plan
    python benchmarks/plan_accuracy.py table results.jsonl ...          # predicted beside measured

`run` starts `uf sft` with the settings of a configuration (--max_steps, no evaluation), ends it when the last step is
in metrics.jsonl, and notes the peak of torch.cuda.max_memory_reserved and the median of tokens/s from the third step
on; where --engine auto may take the fast engine, which now and then meets a new size and makes a graph for it, all
tokens by all seconds from the third step on. Speed and memory do not depend on the values of the weights as long as
they are random. `run --history` keeps the allocator's events of these runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.plan_cases import ACCUMULATION, CASES, VALIDATION, Case  # noqa: E402

TINY = ROOT / "unsloth_factory" / "assets" / "tiny_model"
WARM = 2
SHAPES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4},
}


def make(folder: Path, name: str) -> dict[str, Any]:
    """A model folder with random bfloat16 weights: slices of one normal sample, norms 1."""
    started = time.time()
    target = folder / name
    if (target / "model.safetensors").is_file():
        return {"what": "make", "model": name, "seconds": 0.0}
    target.mkdir(parents=True, exist_ok=True)
    tied = name != "8B"
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SHAPES[name], "vocab_size": 151936,
        "num_key_value_heads": 8 if name != "tiny" else 2, "head_dim": 128 if name != "tiny" else 32,
        "tie_word_embeddings": tied, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "bos_token_id": None,
        "eos_token_id": 2, "dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    }  # fmt: skip
    config["vocab_size"] = 5120 if name == "tiny" else 151936
    (target / "config.json").write_text(json.dumps(config))
    for path in TINY.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, target)
    write_weights(target / "model.safetensors", dict(tensor_shapes(config)))
    return {"what": "make", "model": name, "seconds": round(time.time() - started, 1)}


def write_weights(path: Path, shapes: dict[str, list[int]]) -> None:
    """Random bfloat16 weights of these shapes: slices of one normal sample, ones for norms, zeros for biases."""
    import numpy as np

    generator = np.random.default_rng(0)
    sample = (generator.standard_normal(48 * 2**20, dtype=np.float32) * 0.02).view(np.uint32)
    noise = (sample >> 16).astype(np.uint16)
    ones, zeros = np.full(2**16, 0x3F80, dtype=np.uint16), np.zeros(2**16, dtype=np.uint16)
    header, position = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, shape in shapes.items():
            left, source = int(np.prod(shape)), ones if "norm" in key else zeros if "bias" in key else noise
            while left:
                take = min(left, len(source))
                file.write(source[:take].data)
                left -= take
    os.rename(part, path)


def tensor_shapes(config: dict[str, Any]) -> Any:
    """(name, shape) of every tensor of a Qwen3 checkpoint."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, groups = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    yield "model.embed_tokens.weight", [config["vocab_size"], hidden]
    for index in range(config["num_hidden_layers"]):
        name = f"model.layers.{index}."
        yield name + "self_attn.q_proj.weight", [heads, hidden]
        yield name + "self_attn.k_proj.weight", [groups, hidden]
        yield name + "self_attn.v_proj.weight", [groups, hidden]
        yield name + "self_attn.o_proj.weight", [hidden, heads]
        yield name + "self_attn.q_norm.weight", [dim]
        yield name + "self_attn.k_norm.weight", [dim]
        yield name + "mlp.gate_proj.weight", [inner, hidden]
        yield name + "mlp.up_proj.weight", [inner, hidden]
        yield name + "mlp.down_proj.weight", [hidden, inner]
        yield name + "input_layernorm.weight", [hidden]
        yield name + "post_attention_layernorm.weight", [hidden]
    yield "model.norm.weight", [hidden]
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", [config["vocab_size"], hidden]


def write_data(path: Path, case: Case) -> None:
    """Enough rows for all steps. Prompts are a little too long, so that --max_seq_length cuts each row to its length.

    The answer is half of the row. A mix draws log-normal lengths, median a third of the longest; its first row has the
    full length.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    chooser = random.Random(3407)

    def text(tokens: int) -> str:
        words = "".join(chr(chooser.randrange(0x4E00, 0x5E00)) for _ in range(tokens))
        return tokenizer.decode(tokenizer.encode(words).ids[:tokens]).replace("\ufffd", "")

    with open(path, "w", encoding="utf-8") as file:
        for number in range(case.steps * case.batch * ACCUMULATION):
            length = case.length
            if case.mixed and number:
                length = min(length, max(32, round(length / 3 * chooser.lognormvariate(0, 0.7))))
            full = length == case.length
            prompt = text(length if full else length // 2)
            answer = text(max(8, length // 2 - 16))
            if case.method == "dpo":
                row = {"prompt": prompt, "chosen": answer, "rejected": text(length // 2 - 16)}
            else:
                row = {"instruction": prompt, "output": answer}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def child(case: Case, models: Path, runs: Path, history: bool) -> None:
    """Train; print one JSON line and leave when the last step is done."""
    import torch

    from unsloth_factory.cli import main

    # Nothing is saved here, so that the room which checkpoints would take need not be there.
    shutil.disk_usage = lambda path: shutil._ntuple_diskusage(2**50, 0, 2**50)  # type: ignore[assignment,attr-defined]
    started = time.time()
    run = runs / case.name
    cuda = torch.cuda.is_available()
    if history and cuda:
        torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=400_000)
    threading.Thread(target=_watch, args=(case, run, started, history and cuda), daemon=True).start()
    code = main([case.method, *case.flags(models / case.model, runs / f"{case.name}.jsonl"), "--output_dir", str(run),
                 "--logging_steps", "1", "--save_steps", "1000", "--save_total_limit", "1"])  # fmt: skip
    _report(case, run, started, code)


def _watch(case: Case, run: Path, started: float, history: bool) -> None:
    """End the process once metrics.jsonl holds the last step: what follows (saving) is not measured."""
    path = run / "metrics.jsonl"
    while not path.is_file() or path.read_bytes().count(b"\n") < case.steps:
        time.sleep(0.02)
    if history:
        _write_history(Path(os.environ.get("OUT", run)) / f"history_{case.name}.npz")
    _report(case, run, started, 0)
    sys.stdout.flush()
    os._exit(0)


def _report(case: Case, run: Path, started: float, code: int) -> None:
    import torch

    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    steps = [row for row in rows if "tokens_per_second" in row]
    result: dict[str, Any] = asdict(case) | {"exit": code, "steps": len(steps)}
    result["seconds"] = round(time.time() - started, 1)
    if steps:
        later = steps[min(WARM, len(steps) - 1) :]
        speeds = [row["tokens_per_second"] for row in later]
        seconds = sum(row["tokens"] / row["tokens_per_second"] for row in later)
        fast = case.engine == "auto"
        speed = sum(row["tokens"] for row in later) / seconds if fast else statistics.median(speeds)
        result["tokens_per_second"] = round(speed, 1)
        result["speeds"] = [round(row["tokens_per_second"]) for row in steps]
        result["tokens"] = [row["tokens"] for row in steps]
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        result["reserved"] = torch.cuda.max_memory_reserved()
        result["allocated"] = torch.cuda.max_memory_allocated()
        result["context"] = total - free - torch.cuda.memory_reserved()
        result["total"] = total
        result["gpu"] = torch.cuda.get_device_name(0)
    print(json.dumps(result), flush=True)


def _write_history(path: Path) -> None:
    """The allocator's events as arrays: action, address, size."""
    import numpy as np
    import torch

    events = torch.cuda.memory._snapshot()["device_traces"][0]
    actions = sorted({event["action"] for event in events})
    codes = {action: number for number, action in enumerate(actions)}
    np.savez_compressed(
        path,
        actions=np.array(actions),
        action=np.array([codes[event["action"]] for event in events], dtype=np.uint8),
        address=np.array([event["addr"] for event in events], dtype=np.uint64),
        size=np.array([event["size"] for event in events], dtype=np.uint64),
    )


def run(models: Path, runs: Path, names: list[str], history: bool) -> None:
    """Plan the named configurations, then measure them one after the other; print each result as it comes."""
    runs.mkdir(parents=True, exist_ok=True)
    cases = [CASES[name] for name in names or [case.name for case in VALIDATION]]
    for case in cases:
        write_data(runs / f"{case.name}.jsonl", case)
    plans = _child(["plans", str(models), str(runs), *(case.name for case in cases)])
    results = []
    for case in cases:
        lines = _child(["child", str(models), str(runs), case.name, *(["--history"] * history)])
        result = lines[-1] if lines else asdict(case) | {"exit": 1}
        result["prediction"] = next((plan for plan in plans if plan["name"] == case.name), None)
        shutil.rmtree(runs / case.name, ignore_errors=True)
        results.append(result)
        print(json.dumps(result), flush=True)
        with open(Path(os.environ.get("OUT", runs)) / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    table(results)


def _child(words: list[str]) -> list[dict[str, Any]]:
    """Run a part of this file as a process of its own; the JSON lines that it prints."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        print(f"{' '.join(words)}: exit {done.returncode}", done.stdout[-1000:], done.stderr[-2000:], flush=True)
    return lines


def plans(models: Path, runs: Path, names: list[str]) -> None:
    """What `uf plan` says of the same settings and data, for the GPU at hand (or the one named by PLAN_GPU)."""
    from unsloth_factory.commands.plan import choice_of, forecaster_of
    from unsloth_factory.config.commands import PlanConfig
    from unsloth_factory.config.parse import parse

    for case in (CASES[name] for name in names):
        words = case.flags(models / case.model, runs / f"{case.name}.jsonl")
        words += ["--method", case.method, "--gpu", os.environ.get("PLAN_GPU", "auto")]
        config = parse(PlanConfig, words).config
        forecaster = forecaster_of(config)
        forecast = forecaster.forecast(choice_of(config, forecaster.training))
        plan = {
            "name": case.name,
            "reserved": forecast.memory.reserved,
            "allocated": forecast.memory.allocated,
            "tokens_per_second": forecast.tokens_per_second,
            "host_bound": forecast.host_bound,
            "longest": forecast.longest,
        }
        plan["engine"] = forecaster.training.engine
        print(json.dumps(plan), flush=True)


def table(results: list[dict[str, Any]]) -> None:
    """Predicted beside measured, as rows of a Markdown table."""
    print("| configuration | predicted GiB | measured GiB | error | predicted tok/s | measured tok/s | error |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        plan = row.get("prediction") or {}
        words = f"{row['name']}: {row['model']} {row['kind']}, {row['batch']} x {row['length']:,}"
        words += " mixed" if row["mixed"] else ""
        words += ", " + ("checkpointing" if row["checkpointing"] else "no checkpointing")
        words += "" if row["optimizer"] == "adamw_8bit" else f", {row['optimizer']}"
        words += "" if row["method"] == "sft" else f", {row['method']}"
        words += f", {row['cap_gib']} GiB" if row.get("cap_gib") else ""
        words += f" [{plan['engine']}]" if plan.get("engine") else ""
        cells = []
        for key, unit, form in (("reserved", 2**30, "{:.2f}"), ("tokens_per_second", 1, "{:,.0f}")):
            measured, predicted = row.get(key), plan.get(key)
            cells += [form.format(value / unit) if value else "-" for value in (predicted, measured)]
            cells += [f"{100 * (predicted / measured - 1):+.1f} %" if predicted and measured else "-"]
        print(f"| {words} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Run one of the parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "run", "child", "plans", "table"])
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("--history", action="store_true")
    given = parser.parse_args()
    words = given.arguments
    if given.what == "make":
        processes = [
            subprocess.Popen([sys.executable, "-c", _MAKE, words[0], name], cwd=ROOT) for name in words[1:] or SHAPES
        ]
        sys.exit(max(process.wait() for process in processes))
    if given.what == "child":
        child(CASES[words[2]], Path(words[0]), Path(words[1]), given.history)
    elif given.what == "plans":
        plans(Path(words[0]), Path(words[1]), words[2:])
    elif given.what == "run":
        run(Path(words[0]), Path(words[1]), words[2:], given.history)
    else:
        table([json.loads(line) for path in words for line in Path(path).read_text().splitlines()])


_MAKE = """
import sys
from pathlib import Path
from benchmarks.plan_accuracy import make
print(make(Path(sys.argv[1]), sys.argv[2]), flush=True)
"""

if __name__ == "__main__":
    main()
