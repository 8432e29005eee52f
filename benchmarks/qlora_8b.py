"""Memory and speed of the standard engine on a model of Qwen3-8B's shape with random weights, then its merge.

    python benchmarks/qlora_8b.py make  /tmp/qwen3-8b           # 16 GB on disk, needs a GPU
    python benchmarks/qlora_8b.py sft   /tmp/qwen3-8b /tmp/run  # QLoRA, 20 steps, rows of 2,048 tokens, cap 14.5 GiB
    python benchmarks/qlora_8b.py merge /tmp/run                # CPU only; peak RssAnon of the process

Speed and memory do not depend on the values of the weights. Each command ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CAP_GIB = 14.5
STEPS, BATCH, ACCUMULATION, LENGTH = 20, 2, 4, 2048


def make(folder: Path) -> dict[str, Any]:
    """Random bfloat16 weights of Qwen3-8B's shape, with the bundled tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    started = time.time()
    config = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=40960, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, bos_token_id=None, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    for path in (ROOT / "unsloth_factory" / "assets" / "tiny_model").iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "generation_config")):
            shutil.copy(path, folder)
    return {"what": "make", "seconds": round(time.time() - started, 1)}


def write_data(path: Path, tokenizer_folder: Path) -> None:
    """Conversations of a little under 2,048 tokens, half of them prompt."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    chooser = random.Random(3407)
    count = STEPS * BATCH * ACCUMULATION + 8

    def text(tokens: int) -> str:
        words = "".join(chr(chooser.randrange(0x4E00, 0x5E00)) for _ in range(tokens))
        ids = tokenizer.encode(words).ids[:tokens]
        return tokenizer.decode(ids).replace("�", "")

    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            row = {"instruction": text(LENGTH // 2 - 40), "output": text(LENGTH // 2 - 40)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def sft(model: Path, run: Path) -> dict[str, Any]:
    """`uf sft` with QLoRA under a cap on the process's GPU memory."""
    import torch

    from unsloth_factory.cli import main

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(CAP_GIB * 2**30 / total)
    data = run.parent / "rows.jsonl"
    write_data(data, model)
    started = time.time()
    code = main([
        "sft", "--model", str(model), "--dataset", str(data), "--output_dir", str(run), "--quantization_bit", "4",
        "--max_steps", str(STEPS), "--batch_size", str(BATCH), "--accumulation_steps", str(ACCUMULATION),
        "--max_seq_length", str(LENGTH), "--val_split", "4", "--logging_steps", "1", "--save_steps", "1000",
        "--optimizer", "adamw_8bit",
    ])  # fmt: skip
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    return {
        "what": "sft",
        "exit": code,
        "steps": len(rates),
        "seconds": round(time.time() - started, 1),
        "tokens_per_second_median": rates[len(rates) // 2],
        "max_memory_reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
        "max_memory_allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "adapter_files": sorted(path.name for path in (run / "final_adapter").iterdir()),
        "gpu": torch.cuda.get_device_name(0),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
    }


def merge(run: Path) -> dict[str, Any]:
    """`uf merge` in a child without a GPU; its anonymous memory is sampled every 50 ms."""
    started = time.time()
    command = [sys.executable, str(ROOT / "cli.py"), "merge", "--run", str(run)]
    child = subprocess.Popen(command)
    peak = {"RssAnon": 0, "VmHWM": 0}

    def watch() -> None:
        while child.poll() is None:
            try:
                status = Path(f"/proc/{child.pid}/status").read_text()
            except OSError:
                return
            for line in status.splitlines():
                name, _, rest = line.partition(":")
                if name in peak and rest.split():
                    peak[name] = max(peak[name], int(rest.split()[0]))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = child.wait()
    watcher.join()
    files = list((run / "merged_model").glob("*.safetensors"))
    return {
        "what": "merge",
        "exit": code,
        "seconds": round(time.time() - started, 1),
        "peak_rss_anon_gib": round(peak["RssAnon"] / 2**20, 2),
        "peak_rss_gib": round(peak["VmHWM"] / 2**20, 2),
        "bytes": sum(path.stat().st_size for path in files),
        "shards": len(files),
    }


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["make", "sft", "merge"])
    parser.add_argument("paths", nargs="+", type=Path)
    arguments = parser.parse_args()
    print(json.dumps({"make": make, "sft": sft, "merge": merge}[arguments.what](*arguments.paths)), flush=True)


if __name__ == "__main__":
    main()
