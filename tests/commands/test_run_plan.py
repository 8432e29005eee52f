"""`uf run plan.yaml`: what runs, what is skipped, what runs again, what is refused."""

from __future__ import annotations

import json
import re

import pytest
from command_line import tree, uf, write_gbk, write_pairs
from safetensors.torch import load_file

from unsloth_factory.config.table import COMMANDS

CHAIN = """
model: tiny
max_seq_length: 64
learning_rate: 4e-3
batch_size: 4
accumulation_steps: 1
stages:
  - sft: {{dataset: "{data}#12", max_steps: 2, val_split: 3}}
  - validate: {{max_new_tokens: 8}}
  - merge:
  - gguf: {{no_check: true}}
  - quantize: {{types: "q4_k_m,q8_0"}}
  - validate: {{gguf: all, max_new_tokens: 8}}
  - deploy: {{name: doctor, ollama_host: "127.0.0.1:9"}}
"""


def ran(outcome) -> list[str]:
    """Labels of the stages that were not skipped."""
    assert outcome.code == 0, outcome.err
    lines = re.findall(r"^\[\d/\d\] (\S+)(.*)$", outcome.out, re.MULTILINE)
    return [label.rstrip(":") for label, rest in lines if "skipped" not in rest]


def test_only_what_changed_runs_again(tmp_path):
    data = write_gbk(tmp_path / "data.csv", 16)
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    text = CHAIN.format(data=data)
    plan.write_text(text, encoding="utf-8")
    everything = ["sft", "validate", "merge", "gguf", "quantize", "validate-2", "deploy"]
    assert ran(uf("run", plan, "--output_dir", out)) == everything
    before = tree(out)
    assert ran(uf("run", plan, "--output_dir", out)) == []
    changed = {name for name, state in tree(out).items() if before.get(name) != state}
    assert changed == {"summary.json", "report.html"}
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert set(summary["quantized"]) == {"q4_k_m", "q8_0"}
    assert set(summary["stage_seconds"]) == set(everything)
    plan.write_text(text.replace('"q4_k_m,q8_0"', "q4_0"), encoding="utf-8")
    assert ran(uf("run", plan, "--output_dir", out)) == ["quantize", "validate-2", "deploy"]
    assert sorted(path.name for path in (out / "gguf").glob("*.gguf")) == ["out-f16.gguf", "out-q4_0.gguf"]
    (out / "gguf" / "out-q4_0.gguf").unlink()
    assert ran(uf("run", plan, "--output_dir", out)) == ["quantize"]
    # The file behind `data.csv#12`: with another content the finished training is not deleted unless that is asked for.
    weights = out / "final_adapter" / "adapter_model.safetensors"
    first = weights.read_bytes()
    data.write_bytes(data.read_bytes().replace("听澜".encode("gbk"), "观海".encode("gbk")))
    refused = uf("run", plan, "--output_dir", out)
    assert refused.code == 1
    assert "training samples (SHA-256): was" in refused.err
    assert weights.read_bytes() == first
    assert ran(uf("run", plan, "--output_dir", out, "--force")) == everything
    assert weights.read_bytes() != first
    assert ran(uf("run", plan, "--output_dir", out)) == []


def test_a_harmless_change_keeps_the_finished_training(tmp_path):
    data = write_gbk(tmp_path / "data.csv", 16)
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    text = f"model: tiny\nmax_seq_length: 64\nmax_steps: 2\nval_split: 0\nstages:\n  - sft: {{dataset: {data}}}\n"
    plan.write_text(text, encoding="utf-8")
    assert ran(uf("run", plan, "--output_dir", out)) == ["sft"]
    first = (out / "final_adapter" / "adapter_model.safetensors").read_bytes()
    plan.write_text(text.replace("max_steps", "logging_steps: 1\nmax_steps"), encoding="utf-8")
    outcome = uf("run", plan, "--output_dir", out)
    assert ran(outcome) == ["sft"]
    assert "Resumed from" in outcome.out
    assert (out / "final_adapter" / "adapter_model.safetensors").read_bytes() == first


def test_dpo_goes_on_from_the_adapter_of_sft(tmp_path):
    data, pairs = write_gbk(tmp_path / "data.csv", 8), write_pairs(tmp_path / "pairs.jsonl", 8)
    plan, out = tmp_path / "plan.yaml", tmp_path / "out"
    text = (
        "model: tiny\nmax_seq_length: 64\nbatch_size: 4\naccumulation_steps: 1\nval_split: 0\nmax_steps: 2\n"
        f"output-dir: {out}\n"
        f"stages:\n  - sft: {{dataset: {data}, learning-rate: 4e-3}}\n"
        f"  - dpo: {{dataset: {pairs}, learning_rate: 1e-7, beta: 0.2}}\n  - merge\n"
    )
    plan.write_text(text.replace("output-dir", "output_dir"), encoding="utf-8")
    assert ran(uf("run", plan)) == ["sft", "dpo", "merge"]
    first, second = (load_file(out / name / "final_adapter/adapter_model.safetensors") for name in ("sft", "dpo"))
    assert any((tensor != 0).any() for name, tensor in first.items() if "lora_B" in name)
    for name, tensor in first.items():
        assert (second[name] - tensor).abs().max() < 1e-5, name  # two steps of 1e-7 away from where sft ended
    assert any((second[name] != tensor).any() for name, tensor in first.items())
    assert (out / "dpo" / "merged_model" / "model.safetensors").is_file()
    plan.write_text(plan.read_text(encoding="utf-8").replace("beta: 0.2", "beta: 0.3"), encoding="utf-8")
    refused = uf("run", plan)
    assert refused.code == 1
    assert "--beta: was 0.2, now 0.3" in refused.err
    plan.write_text(
        plan.read_text(encoding="utf-8").replace("beta: 0.3", "beta: 0.3, overwrite: true"), encoding="utf-8"
    )
    assert ran(uf("run", plan)) == ["dpo", "merge"]


GOOD = "model: tiny\nstages:\n  - sft: {dataset: data.csv}\n"
MISTAKES = {
    "unknown stage": (GOOD + "  - quantise:\n", ["stage 2", "quantise", "Did you mean quantize?"]),
    "unknown setting": ("model: tiny\nstages:\n  - sft: {dataset: d.csv, epoch: 1}\n", ["epoch", "epochs"]),
    "bad value": (GOOD + "  - validate: {batch_size: many}\n", ["validate", "batch_size", "many"]),
    "broken rule": ("model: tiny\nstages:\n  - sft: {dataset: d.csv, epochs: -1}\n", ["--epochs -1.0", "above 0"]),
    "common setting of no stage": ("modell: tiny\nstages: [merge]\n", ["modell"]),
    "no stages": ("model: tiny\n", ["stages"]),
    "two commands in one": ("stages:\n  - {merge: , gguf: }\n", ["stage 1"]),
    "settings are no mapping": ("stages:\n  - merge: 3\n", ["stage 1", "merge", "3"]),
    "not YAML": ("stages: [", ["plan.yaml"]),
    "a list": ("- sft\n", ["plan.yaml"]),
    "empty": ("", ["plan.yaml"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_plan_starts_nothing(tmp_path, monkeypatch, mistake):
    text, named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    load = type(COMMANDS["run"]).load
    monkeypatch.setattr(
        type(COMMANDS["run"]),
        "load",
        lambda self: load(self) if self is COMMANDS["run"] else pytest.fail("a stage was started"),
    )
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    outcome = uf("run", "plan.yaml", "--output_dir", tmp_path / "out")
    monkeypatch.undo()
    assert outcome.code == 2, outcome.err
    for word in ["plan.yaml", *named]:
        assert word in outcome.err, outcome.err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_a_missing_plan(tmp_path):
    assert uf("run").code == 2
    outcome = uf("run", tmp_path / "no.yaml")
    assert outcome.code == 2
    assert "no.yaml" in outcome.err
    assert not list(tmp_path.iterdir())
