"""C-Eval with choices scored: `uf evaluate` against lm-evaluation-harness' HF backend, on the very same prompts.

    python benchmarks/evaluation_speed.py MODEL CEVAL [--peer_batch_sizes 8,16,32] [--engine fast]     # speed
    python benchmarks/evaluation_speed.py MODEL CEVAL --rows 5 --dtype float32     # the same answers
    python benchmarks/evaluation_speed.py MODEL CEVAL --reference            # whose rounding it is

MODEL is a folder whose weights may be random; CEVAL has the subfolders dev and val. Both load the same 16-bit weights
(float32 on a CPU) in one process, one after the other; loading is not counted, tokenising is, on both sides. The
harness runs each batch size on every 13th question, and the quickest one on all; ours runs all three times. Printed as
JSON lines: seconds, the ratio, the largest difference of log-probabilities, and how many choices differ, of all
questions and of those whose two best choices are more than `GAP` apart; the same for the harness against itself at its
second best batch size. In bfloat16 other kernels make other roundings: 0.02 on average in 36 random layers.
float16, which a T4 computes in, rounds eight times finer. `--reference` scores all of them once more with ours in
float32, which `--dtype float32` shows to be the harness' own to 2e-5, and compares either side's answers with those.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
LETTERS = "ABCD"
GAP = 0.05
"""Of the log-probabilities: closer ones may change places by the rounding of 16-bit numbers."""
PROBED = 13
"""One question of so many tells the harness' best batch size."""


def main() -> None:
    """Measure."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("ceval", type=Path)
    parser.add_argument("--rows", type=int, help="questions of each subject; default: all")
    parser.add_argument("--peer_batch_sizes", default="8,16,32", type=_numbers)
    parser.add_argument("--engine", default="auto", choices=["auto", "standard", "fast"])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="of both sides")
    parser.add_argument("--reference", action="store_true", help="both sides' answers against float32's")
    given = parser.parse_args()
    given.dtype = given.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    with tempfile.TemporaryDirectory() as folder:
        data = first_rows(given.ceval, Path(folder), given.rows)
        scores, texts, seconds = ours(given.model, given.engine, data, given.dtype)
        reference = ours(given.model, given.engine, data, "float32")[0] if given.reference else None
    other, other_seconds = theirs(given.model, texts, given.peer_batch_sizes, given.dtype)
    if reference is not None:
        _print(what="ours against float32", **_compared(scores, reference))
        _print(what="lm-eval against float32", **_compared(other, reference))
    _print(what="ratio", questions=len(texts), **_compared(scores, other), ratio=round(other_seconds / seconds, 2))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def first_rows(source: Path, folder: Path, rows: int | None) -> Path:
    """C-Eval's dev and val with at most so many questions a subject."""
    for split, limit in (("dev", None), ("val", rows)):
        (folder / split).mkdir(parents=True)
        for path in sorted((source / split).glob("*.csv")):
            with open(path, encoding="utf-8", newline="") as file:
                kept = list(csv.reader(file))[: None if limit is None else limit + 1]
            with open(folder / split / path.name, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(kept)
    return folder


def ours(model: Path, engine: Any, data: Path, dtype: str) -> tuple[np.ndarray, list[str], float]:
    """(scores [n, 4], prompts, seconds: the middle of three runs, in float32 of one)."""
    import torch

    from unsloth_factory.config.settings import ModelSettings
    from unsloth_factory.evaluation.choice.benchmark import load_benchmark
    from unsloth_factory.evaluation.choice.prompts import PromptMaker
    from unsloth_factory.evaluation.choice.scored import ChoiceOptions, evaluate, model_scorers
    from unsloth_factory.model.load import load_model

    loaded = load_model(ModelSettings(model=str(model), engine=engine), dtype=getattr(torch, dtype))
    texts: list[str] = []

    class Recorder(PromptMaker):
        def subject(self, *arguments: Any, **options: Any) -> Any:
            prompts = super().subject(*arguments, **options)
            texts.extend(prompt.text for prompt in prompts.prompts)
            return prompts

    maker = Recorder(benchmark=load_benchmark("ceval"), tokenizer=loaded.tokenizer, template=None)

    def run(subjects: str | None) -> tuple[Any, float]:
        texts.clear()
        options = ChoiceOptions(n_shot=5, max_tokens=loaded.max_positions, subjects=subjects)
        start = time.perf_counter()
        return evaluate(maker, data, model_scorers(loaded, ["base"]), options), time.perf_counter() - start

    run("computer_network")  # libraries set themselves up
    results = [run(None) for _ in range(1 if dtype == "float32" else 3)]
    seconds = sorted(taken for _, taken in results)
    scores = np.array([[record["base"]["logprobs"][letter] for letter in LETTERS] for record in results[-1][0].records])
    _print(what="ours", engine=loaded.engine, questions=len(texts), seconds=[round(taken, 2) for taken in seconds])
    return scores, texts, seconds[len(seconds) // 2]


def theirs(model: Path, texts: list[str], batch_sizes: Sequence[int], dtype: str) -> tuple[np.ndarray, float]:
    """(log-probabilities [n, 4], seconds) at the quickest of the batch sizes."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    cuda = torch.cuda.is_available()
    peer = HFLM(pretrained=str(model), device="cuda" if cuda else "cpu", dtype=dtype, batch_size=1)

    def score(asked: list[str], size: int) -> tuple[np.ndarray, float]:
        peer.batch_size_per_gpu = size
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=(text, letter), idx=index)
            for text in asked
            for index, letter in enumerate(LETTERS)
        ]
        start = time.perf_counter()
        answers = peer.loglikelihood(requests, disable_tqdm=True)
        return np.array([value for value, _ in answers]).reshape(-1, len(LETTERS)), time.perf_counter() - start

    score(texts[:2], 1)
    times: dict[int, float] = {}
    for size in batch_sizes if len(batch_sizes) > 1 else ():
        times[size] = score(texts[::PROBED], size)[1]
        _print(what="lm-eval, probe", batch_size=size, questions=len(texts[::PROBED]), seconds=round(times[size], 2))
    best, *others = sorted(batch_sizes, key=lambda size: times.get(size, 0.0))
    scores, seconds = score(texts, best)
    _print(what="lm-eval", batch_size=best, questions=len(texts), seconds=round(seconds, 2))
    if others:
        _print(what="lm-eval against itself", batch_size=others[0], **_compared(score(texts, others[0])[0], scores))
    return scores, seconds


def _compared(mine: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    best = np.sort(other, axis=1)
    clear = best[:, -1] - best[:, -2] > GAP
    differ = mine.argmax(axis=1) != other.argmax(axis=1)
    gaps = np.abs(mine - other)
    return {
        "log_probabilities_apart": {"mean": round(float(gaps.mean()), 6), "max": round(float(gaps.max()), 6)},
        "choices_differ": int(differ.sum()),
        "clear_questions": int(clear.sum()),
        "clear_choices_differ": int((differ & clear).sum()),
    }


def _print(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
