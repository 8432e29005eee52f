"""`uf plan`: the page, the JSON, the command line that it prints, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from command_line import DEMO, uf, write_pairs

from unsloth_factory.commands.plan import command_line, make_plan
from unsloth_factory.config.commands import DpoConfig, PlanConfig, SftConfig
from unsloth_factory.config.parse import configure, parse
from unsloth_factory.model.paths import TINY_FOLDER

DATA = DEMO / "handbook_train.jsonl"
LLAMA = {
    "model_type": "llama", "vocab_size": 128_256, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json and nothing else."""
    path = tmp_path_factory.mktemp("llama") / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def planned(*words: object) -> tuple[int, dict[str, Any]]:
    outcome = uf("plan", *words, "--json")
    return outcome.code, json.loads(outcome.out)


def test_the_page_says_all_in_80_columns(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    outcome = uf("plan", "--model", llama, "--gpu", "T4", "--max_seq_length", 1024)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("fits: ")
    assert lines[0].endswith(" of 14.6 GiB on T4")
    assert "A model: the T4 was never measured" in outcome.words
    for part in ("base weights, frozen", "gradients", "optimizer state", "rounding and gaps", "CUDA context"):
        assert part in outcome.out
    assert "for 1,000 samples (assumed: no --dataset)" in outcome.words
    assert "would fit (--max_seq_length)" in outcome.words
    assert all(len(line) <= 80 for line in lines[:-1])
    assert lines[-1].startswith("uf sft --model ")


def test_the_engine_that_auto_would_take_is_planned(llama: Path) -> None:
    words = ("--model", llama, "--gpu", "T4", "--max_seq_length", 256)
    assert "Engine fast: activations fill the memory" in uf("plan", *words).words
    code, plan = planned(*words)
    assert (code, plan["engine"]) == (0, "fast")
    assert planned(*words, "--engine", "fast")[1]["engine"] == "fast"
    for other in (
        ("--engine", "standard"),
        ("--finetuning_type", "full"),
        ("--method", "dpo"),
    ):
        assert planned(*words, *other)[1]["engine"] == "standard"
    assert planned(*words, "--lora_dropout", 0.1)[1]["engine"] == "fast"
    outcome = uf("plan", *words, "--engine", "fast", "--finetuning_type", "full")
    assert outcome.code == 2
    assert "--engine fast with --finetuning_type full is not planned yet" in outcome.err
    outcome = uf("plan", *words, "--engine", "fast", "--matmul", "fp8")
    assert outcome.code == 2
    assert "--matmul fp8 is not planned yet" in outcome.err


def test_the_fast_engine_takes_the_memory_there_is(llama: Path) -> None:
    words = ("--model", llama, "--gpu", "T4")
    _, plan = planned(*words)
    _, less = planned(*words, "--max_memory", "1.5GiB")
    _, least = planned(*words, "--engine", "fast", "--low_memory")
    assert less["reserved"] <= 1.5 * 2**30 < plan["reserved"]
    assert least["reserved"] < less["reserved"]
    assert least["tokens_per_second"] < less["tokens_per_second"] < plan["tokens_per_second"]


def test_inputs_that_leave_the_card_are_told(tmp_path: Path) -> None:
    """32 layers x 32,768 tokens x 2 KB are 2 GiB, of which this card has no room for the most."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"num_hidden_layers": 32, "max_position_embeddings": 32_768}))
    words = ("--model", path, "--gpu", "T4", "--max_seq_length", 32_768, "--batch_size", 1)
    assert "layer inputs in the CPU's memory" not in uf("plan", *words).words
    assert planned(*words)[1]["pinned"] == 0
    words += ("--max_memory", "4GiB")
    code, plan = planned(*words)
    assert (code, plan["verdict"]) == (0, "fits")
    assert 0.5 * 2**30 < plan["pinned"] < 2 * 2**30
    assert f"layer inputs in the CPU's memory: {plan['pinned'] / 2**30:.1f} GiB" in uf("plan", *words).words


def test_the_sums_of_the_page_are_those_of_the_verdict(llama: Path) -> None:
    _, plan = planned("--model", llama, "--gpu", "H200", "--no_quantization")
    assert sum(plan["parts"].values()) == plan["allocated"]
    assert plan["allocated"] + plan["slack"] == plan["reserved"]
    assert (
        sum(plan["parameters"].values()) == 2 * 128_256 * 1024 + 4 * (2 * 1024 * 1280 + 3 * 1024 * 4096 + 2048) + 1024
    )
    assert plan["settings"]["quantized"] is False
    assert plan["gpu"]["measured"] is True


def test_the_command_line_parses_to_the_advised_settings(llama: Path) -> None:
    _, plan = planned(
        "--model", llama, "--gpu", "L4", "--lora_r", 8, "--columns", "prompt=q,response=a", "--epochs", 1.5
    )
    words = shlex.split(plan["command"])
    assert words[:2] == ["uf", "sft"]
    config = parse(SftConfig, words[2:], "sft").config
    advised = plan["advised"]["settings"]
    assert config.model.model == str(llama)
    assert config.loop.batch_size * config.loop.accumulation_steps == 8
    assert config.loop.batch_size == advised["batch_size"]
    assert config.loop.no_gradient_checkpointing is not advised["checkpointing"]
    assert config.tuning.quantization_bit == 4
    assert (config.tuning.lora_r, config.loop.epochs) == (8, 1.5)
    assert config.data.columns == {"prompt": "q", "response": "a"}


def test_every_setting_survives_the_command_line(tmp_path: Path) -> None:
    config = configure(
        PlanConfig, method="dpo", model="tiny", dataset=str(tmp_path / "a b.jsonl"), beta=0.2, lora_dropout=0.1,
        no_packing=True, output_dir="out", learning_rate=1e-4, no_quantization=True, gpu="T4", max_steps=3,
    )  # fmt: skip
    choice = make_plan(configure(PlanConfig, method="dpo", model="tiny", gpu="T4", no_quantization=True)).asked.choice
    words = shlex.split(command_line(config, choice))
    again = parse(DpoConfig, words[2:], "dpo").config
    assert (again.beta, again.loop, again.tuning) == (config.beta, config.loop, config.tuning)
    assert (again.data, again.run, again.model) == (config.data, config.run, config.model)


def test_lengths_come_from_the_dataset() -> None:
    words = (
        "--model",
        "tiny",
        "--gpu",
        "T4",
        "--dataset",
        DATA,
        "--epochs",
        1,
        "--engine",
        "standard",
        "--batch_size",
        4,
    )
    code, plan = planned(*words)
    assert code == 0
    assert not plan["assumed_data"]
    assert plan["longest"] is None
    assert plan["steps"] == -(-plan["samples"] // 16)
    assert 4 < plan["longest_micro_batch"] < 4 * 400
    _, short = planned(*words, "--max_seq_length", 64)
    assert short["longest_micro_batch"] <= 4 * 64
    _, padded = planned(*words, "--no_packing")
    assert padded["longest_micro_batch"] >= plan["longest_micro_batch"]
    _, together = planned(*words[:-4], "--engine", "fast", "--batch_size", 1, "--accumulation_steps", 16)
    assert 8 * 400 > together["longest_micro_batch"] > plan["longest_micro_batch"]


def test_preference_pairs_take_two_rows_each(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 12)
    code, plan = planned("--model", "tiny", "--gpu", "T4", "--method", "dpo", "--dataset", pairs, "--val_split", 0)
    assert code == 0
    assert plan["samples"] == 12
    assert plan["command"].startswith("uf dpo ")
    _, assumed = planned("--model", "tiny", "--gpu", "T4", "--method", "dpo", "--max_seq_length", 128)
    assert assumed["longest_micro_batch"] == 2 * 2 * 128


def test_a_size_alone_tells_memory_but_no_speed(llama: Path) -> None:
    code, plan = planned("--model", llama, "--gpu", "16GB")
    assert code == 0
    assert plan["tokens_per_second"] is None
    assert plan["advised"]["verdict"] == "fits"
    assert "cannot be told" in uf("plan", "--model", llama, "--gpu", "16GB").words


def test_what_does_not_fit_is_made_to_fit(llama: Path) -> None:
    words = ("--model", llama, "--gpu", "2.5GB", "--no_quantization", "--batch_size", 8, "--max_seq_length", 2048)
    code, plan = planned(*words)
    assert (code, plan["verdict"]) == (0, "fits")  # the fast engine cuts and recomputes by itself
    words += ("--engine", "standard")
    code, plan = planned(*words)
    assert code == 1
    assert plan["verdict"] == "does not fit"
    assert plan["advised"]["verdict"] == "fits"
    assert plan["advised"]["settings"]["batch_size"] * plan["advised"]["settings"]["accumulation_steps"] == 32
    assert plan["changes"]
    outcome = uf("plan", *words)
    assert outcome.out.startswith("does not fit: ")
    assert "advised:" in outcome.out
    assert outcome.out.splitlines()[-1].startswith("uf sft ")


def test_full_training_that_fits_in_no_way_leads_to_qlora(llama: Path) -> None:
    outcome = uf("plan", "--model", llama, "--gpu", "4GB", "--finetuning_type", "full")
    assert outcome.code == 1
    assert "Nothing fits on 4 GB" in outcome.words
    assert "QLoRA does" in outcome.words
    assert "--quantization_bit 4" in outcome.out.splitlines()[-1]
    nothing = uf("plan", "--model", llama, "--gpu", "0.7GB")
    assert nothing.code == 1
    assert "Use a smaller model or a larger card" in nothing.words


def test_a_llama_factory_file_can_be_planned(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "stage: sft\nmodel_name_or_path: tiny\nfinetuning_type: lora\ncutoff_len: 256\n"
        "per_device_train_batch_size: 4\noutput_dir: out\nsave_steps: 50\nbf16: true\n"
    )
    code, plan = planned(job, "--gpu", "T4")
    assert code == 0
    assert plan["settings"]["batch_size"] == 4
    assert "--output_dir out --save_steps 50" in plan["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "T4"), "--model is missing"),
        (("--model", "tiny", "--gpu", "Voodoo2"), "--gpu Voodoo2: unknown"),
        (("--model", "tiny", "--gpu", "T4", "--method", "grpo"), "--method grpo: this version cannot train it"),
        (("--model", "tiny", "--gpu", "T4", "--method", "dpo", "--finetuning_type", "full"), "dpo trains LoRA alone"),
        (("--model", "tiny", "--gpu", "T4", "--engine", "unsloth"), "--engine unsloth: not in this version"),
        (("--model", "tiny", "--gpu", "T4", "--finetuning_type", "freeze", "--freeze_last_n", 9), "has 4 layers"),
        (("--model", "tiny", "--gpu", "T4", "--lora_target", "qkv"), "no linear layer has that name"),
        (("--model", "tiny", "--gpu", "T4", "--dataset", DATA, "--domain", "astrology"), "--domain astrology"),
    ],
)
def test_what_is_refused(words: tuple, message: str) -> None:
    outcome = uf("plan", *words)
    assert outcome.code in (1, 2)
    assert message in outcome.err


def test_a_dataset_without_a_tokenizer_is_refused(llama: Path) -> None:
    assert "needs the model's tokenizer" in uf("plan", "--model", llama, "--gpu", "T4", "--dataset", DATA).err


def test_without_a_gpu_one_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = uf("plan", "--model", "tiny")
    assert outcome.code == 2
    assert "such as --gpu T4" in outcome.err


def test_the_gpu_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    class Card:
        name, total_memory = "Tesla T4", 15_636_824_064

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    code, plan = planned("--model", "tiny")
    assert code == 0
    assert plan["gpu"]["name"] == "Tesla T4"
    assert plan["gpu"]["memory"] == Card.total_memory
    assert plan["tokens_per_second"] > 0


def test_a_prequantised_model_cannot_train_in_full(tmp_path: Path) -> None:
    config = json.loads((TINY_FOLDER / "config.json").read_text()) | {"quantization_config": {"load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        "cannot train themselves" in uf("plan", "--model", tmp_path, "--gpu", "T4", "--finetuning_type", "full").words
    )
    _, plan = planned("--model", tmp_path, "--gpu", "T4", "--no_quantization")
    assert plan["settings"]["quantized"] is True
    assert "16-bit base weights" not in {option["change"] for option in plan["options"]}
