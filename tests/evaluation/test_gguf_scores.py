"""`uf evaluate --gguf`: the same questions and token ids through llama.cpp give what transformers gives."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.commands.gguf_files import gguf_paths, gguf_variants
from unsloth_factory.commands.source import resolve_source
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun, ModelSettings
from unsloth_factory.evaluation.choice.prompts import ChoicePrompt
from unsloth_factory.evaluation.compare.agreement import agreement
from unsloth_factory.evaluation.gguf_file import TokenComparison
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.run.atomic import sha256

ROOT = Path(__file__).resolve().parents[2]
MINI = ROOT / "unsloth_factory" / "assets" / "demo" / "mini_ceval"


def evaluate(folder: Path, name: str, **settings) -> tuple[dict, list[dict]]:
    """(report, records) of one command."""
    config = EvaluateConfig(model=ModelSettings(model="tiny"), save_dir=str(folder), **settings)
    assert command.run(config) == 0
    lines = (folder / f"{name}_samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8")), [json.loads(line) for line in lines]


def require_alike(tmp_path: Path, f16: Path, **settings) -> dict:
    """Score by transformers and by the f16 file, and hold them to the target; gives the file's report."""
    _, own = evaluate(tmp_path, "ceval", **settings)
    report, records = evaluate(tmp_path, "ceval_gguf", gguf=str(f16), **settings)
    assert [r["prompt_sha256"] for r in own] == [r["prompt_sha256"] for r in records]
    found = agreement([r["base"] for r in own], [r["f16"] for r in records])
    print(found)
    assert found.same_choice >= 0.99 * found.n
    assert found.mean_difference < 0.05
    assert report["details"]["token_ids"]["f16"] == {"prompts": found.n, "equal": found.n}
    return report


def test_bundled_questions_score_alike_through_transformers_and_the_f16_file(tiny_ggufs, tmp_path):
    report = require_alike(
        tmp_path, tiny_ggufs["f16"], task="ceval", task_dir=str(MINI), subjects="law,computer_network"
    )
    f16 = tiny_ggufs["f16"]
    known = {"path": str(f16), "bytes": f16.stat().st_size, "sha256": sha256(f16)}
    assert report["model"]["gguf"] == {"f16": known}
    assert report["model"]["engine"].startswith("llama.cpp (cyllama ")
    page = (tmp_path / "ceval_gguf.md").read_text(encoding="utf-8")
    assert f"| f16 | {f16} | 8.4 | {known['sha256']} |" in page


def test_ceval_scores_alike_through_transformers_and_the_f16_file(shared_data, tiny_ggufs, tmp_path):
    """Four questions of six subjects; all 1,346 with CEVAL_ROWS=all (two minutes on two busy cores)."""
    everything = os.environ.get("CEVAL_ROWS") == "all"
    for split, rows in (("dev", 99), ("val", 99999 if everything else 4)):
        for path in sorted((shared_data / "ceval" / split).glob("*.csv"))[:: 1 if everything else 9]:
            with open(path, encoding="utf-8", newline="") as file:
                kept = list(csv.reader(file))[: rows + 1]
            target = tmp_path / "data" / split / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(kept)
    names = sorted(path.stem.removesuffix("_val") for path in (tmp_path / "data" / "val").iterdir())
    folder = str(tmp_path / "data")
    require_alike(tmp_path, tiny_ggufs["f16"], task="ceval", task_dir=folder, subjects=",".join(names))


def test_options_of_several_tokens_score_alike(tiny_ggufs, tmp_path):
    require_alike(
        tmp_path, tiny_ggufs["f16"], task="ceval", task_dir=str(MINI), subjects="law", choice_mode="text", n_shot=1
    )


def test_files_are_compared_and_finished_subjects_are_not_scored_again(tiny_ggufs, tmp_path, monkeypatch, capsys):
    settings = {"task": "ceval", "task_dir": str(MINI), "subjects": "law", "n_shot": 1}
    files = ",".join(str(tiny_ggufs[name]) for name in ("f16", "q4_0"))
    first, records = evaluate(tmp_path, "ceval_gguf", gguf=files, **settings)
    compared = first["details"]["agreement"]["q4_0"]
    assert compared["with"] == "f16"
    assert compared["same_choice"] == sum(r["f16"]["choice"] == r["q4_0"]["choice"] for r in records)
    assert compared["mean_difference"] > 0
    assert f"q4_0 chooses as f16 in {compared['same_choice']} of 20 questions" in capsys.readouterr().out
    calls = []
    original = LlamaCpp.tail_logits
    monkeypatch.setattr(LlamaCpp, "tail_logits", lambda *args: (calls.append(args[0].path), original(*args))[1])
    again, kept = evaluate(tmp_path, "ceval_gguf", gguf=files, **settings)
    assert (again, kept, calls) == (first, records, [])
    copy = tmp_path / "other-q4_0.gguf"
    copy.write_bytes(tiny_ggufs["q8_0"].read_bytes())  # another file under the same variant's name
    _, other = evaluate(tmp_path, "ceval_gguf", gguf=f"{tiny_ggufs['f16']},{copy}", **settings)
    assert set(calls) == {copy}
    assert [r["q4_0"] for r in other] != [r["q4_0"] for r in records]


def test_generated_answers_equal_those_of_transformers_and_are_kept(tiny_ggufs, tmp_path, monkeypatch):
    for split, count in (("train", 2), ("test", 4)):
        rows = [{"question": f"{split} {i}+{i}=?", "answer": f"{i}+{i}={2 * i}\n#### {2 * i}"} for i in range(count)]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    settings = {"task": "gsm8k", "task_dir": str(tmp_path), "n_shot": 1, "max_new_tokens": 24}
    _, own = evaluate(tmp_path / "out", "gsm8k", **settings)
    answers = tmp_path / "out" / "gsm8k_answers"
    before = set(answers.iterdir())
    report, records = evaluate(tmp_path / "out", "gsm8k_gguf", gguf=str(tiny_ggufs["f16"]), **settings)
    assert [r["f16"]["answer"] for r in records] == [r["base"]["answer"] for r in own]
    assert report["model"]["gguf"]["f16"]["path"] == str(tiny_ggufs["f16"])
    assert report["details"]["token_ids"]["f16"] == {"prompts": 4, "equal": 4}
    # Stopped in the middle of a line: that answer alone is made again.
    (path,) = set(answers.iterdir()) - before
    path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    calls = []
    original = LlamaCpp.generate
    monkeypatch.setattr(LlamaCpp, "generate", lambda *args: (calls.append(args[1]), original(*args))[1])
    for made in (1, 0):
        calls.clear()
        assert evaluate(tmp_path / "out", "gsm8k_gguf", gguf=str(tiny_ggufs["f16"]), **settings) == (report, records)
        assert len(calls) == made
    evaluate(tmp_path / "out", "gsm8k_gguf", gguf=str(tiny_ggufs["f16"]), **{**settings, "max_new_tokens": 5})
    assert len(calls) == 4


def test_prompts_that_llama_cpp_splits_otherwise_are_counted():
    class File:
        class model:  # noqa: N801 - an attribute of the real one
            tokenize = staticmethod(lambda text: [ord(char) for char in text.replace("x", "y")])

    class Tokenizer:
        bos_token_id = 7

        def convert_tokens_to_ids(self, tokens):
            return [ord(token) for token in tokens]

    found = TokenComparison(Tokenizer(), ["#"])
    for text, ids in [("#ab", "#ab"), ("#ax", "#ax"), ("a#b", "a-b"), ("#ab", "\7#ab"), ("cut#ab", "#ab")]:
        found.add(File(), [ChoicePrompt([ord(char) for char in ids], [], text)])
    assert (found.compared, found.equal) == (4, 3)  # the third has a control token typed as text
    assert "splits 1 of 4 prompts into other tokens than the model's own (first: ...'#ax')" in str(found.note("q"))
    found.equal = 4
    assert found.note("q") is None


def test_names_of_files_and_refusals(tiny_ggufs, tmp_path):
    paths = [Path("a/m-f16.gguf"), Path("a/m-q8_0.gguf"), Path("b/n-q8_0.gguf")]
    assert list(gguf_variants(paths)) == ["f16", "m-q8_0", "n-q8_0"]
    assert list(gguf_variants([Path("a/m-q8_0.gguf"), Path("b/m-q8_0.gguf")])) == ["a/m-q8_0.gguf", "b/m-q8_0.gguf"]
    resolved = resolve_source(FinishedRun(), ModelSettings(model="tiny"))
    assert gguf_paths("x.gguf, y.gguf,x.gguf", resolved) == [Path("x.gguf"), Path("y.gguf")]
    with pytest.raises(UsageError, match="names no file"):
        gguf_paths(" ,", resolved)
    model = ModelSettings(model="tiny")
    with pytest.raises(UsageError, match="--quantization_bit 4 loads a model in NF4; a GGUF file has its own type"):
        command.run(EvaluateConfig(model=model, gguf="a.gguf", quantization_bit=4, task_dir=str(MINI)))
    with pytest.raises(UserError, match=r"a\.gguf is missing"):
        command.run(EvaluateConfig(model=model, gguf=str(tmp_path / "a.gguf"), task_dir=str(MINI)))


def test_tail_logits_equal_all_logits(tiny_ggufs):
    ids = [int(i) for i in np.random.default_rng(3).integers(0, 5000, 300)]  # more than one call of the decoder
    with LlamaCpp(tiny_ggufs["f16"], exact=True) as llama:
        whole = llama.logits(ids)
        for length, last in ((300, 1), (300, 60), (290, 290), (200, 3), (300, 120)):
            found = llama.tail_logits(ids[:length], last)
            assert found.shape == (last, whole.shape[1])
            np.testing.assert_allclose(found, whole[length - last : length], atol=0.03)  # a single row goes another way
