#!/usr/bin/env python3
"""Make the model and the demo data that ship with the package. Seeded; see each subcommand's help.

make_bundled_model.py handbook                         # the demo's training lines and questions
make_bundled_model.py tokenizer --extra_text DIR       # tokenizer and configuration (CPU, a minute)
make_bundled_model.py train --device cuda --extra_text DIR --output DIR
make_bundled_model.py check                            # answers, stop rate, the demo's fine-tuning
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "unsloth_factory" / "assets"
MODEL = ASSETS / "tiny_model"
DEMO = ASSETS / "demo"
PACKS = ROOT / "unsloth_factory" / "knowledge" / "packs"


def make_handbook(_: argparse.Namespace) -> None:
    """Write the demo's data."""
    from bundled_model.handbook import write_handbook

    write_handbook(DEMO)
    print(f"written: {DEMO}")


def make_tokenizer(args: argparse.Namespace) -> None:
    """Train the BPE and write every file of the model folder but the weights."""
    from bundled_model.extra_text import read_extra_text
    from bundled_model.tokenizer import train_tokenizer, training_texts, write_model_files

    core = train_tokenizer(training_texts(read_extra_text(args.extra_text), drawn=3000))
    write_model_files(core, MODEL)
    print(f"written: {MODEL}, {core.get_vocab_size()} tokens")


def train(args: argparse.Namespace) -> None:
    """Pre-train, write the weights, then show what they can do."""
    from bundled_model.corpus import make_rows
    from bundled_model.extra_text import read_extra_text, read_packs
    from bundled_model.pretrain import pretrain

    started = time.time()
    extra = [*read_extra_text(args.extra_text), *read_packs(PACKS)]
    print(f"extra conversations: {len(extra)}", flush=True)
    rows = make_rows(
        args.documents,
        extra,
        MODEL / "tokenizer.json",
        workers=args.workers,
        seed=args.seed,
        entities=args.entities,
    )
    used = float((rows.weights > 0).mean())
    print(f"corpus: {len(rows.ids)} rows, {rows.ids.size / 1e6:.1f} M tokens, {used:.1%} used", flush=True)
    print(f"corpus took {time.time() - started:.0f} s", flush=True)
    pretrain(rows, args)
    if not args.no_check:
        check(args)


def check(args: argparse.Namespace) -> None:
    """Print sample answers and run the demo's fine-tuning in small."""
    from bundled_model.check import check_model

    check_model(args.output, MODEL, DEMO, args)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("handbook", help="write the demo's data").set_defaults(run=make_handbook)
    tokenizer = commands.add_parser("tokenizer", help="train the tokenizer, write the configuration files")
    tokenizer.set_defaults(run=make_tokenizer)
    training = commands.add_parser("train", help="pre-train and write model.safetensors")
    training.set_defaults(run=train)
    checking = commands.add_parser("check", help="sample answers and the demo's fine-tuning")
    checking.set_defaults(run=check)
    for command in (tokenizer, training):
        command.add_argument("--extra_text", type=Path, default=None, help="folder of permissively licensed chat sets")
    training.add_argument("--documents", type=int, default=1_400_000, help="documents of the corpus")
    training.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    training.add_argument("--batch_rows", type=int, default=96, help="rows of 512 tokens in a step")
    training.add_argument("--max_seconds", type=float, default=200, help="the schedule ends by then at the latest")
    training.add_argument("--learning_rate", type=float, default=3e-3)
    training.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that make the corpus")
    training.add_argument("--seed", type=int, default=1)
    training.add_argument("--bf16", action="store_true", help="bf16 autocast on a CPU too")
    training.add_argument("--no_check", action="store_true")
    for command in (training, checking):
        command.add_argument("--entities", type=int, default=200, help="known entities of each of the four kinds")
        command.add_argument("--device", default="cpu", help="cpu or cuda")
        command.add_argument("--output", type=Path, default=MODEL, help="folder of model.safetensors")
        command.add_argument("--lora_lr", type=float, default=4e-3, help="learning rate of the demo's fine-tuning")
        command.add_argument("--lora_epochs", type=int, default=8)
        command.add_argument("--sweep", action="store_true", help="try further learning rates and epochs")
        command.add_argument("--lora_batch", type=int, default=8)
    return parser


if __name__ == "__main__":
    arguments = build_parser().parse_args()
    arguments.run(arguments)
