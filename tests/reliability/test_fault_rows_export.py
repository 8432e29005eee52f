"""Rows 8, 9, 17, 35 and 36 of the table of faults: exports on a full disk, with broken numbers, of other adapters."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.export import gguf as gguf_module
from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.export.merge import MergeOptions, merge, publish_trained
from unsloth_factory.export.quantize import quantize
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.model.load import load_model
from unsloth_factory.run.atomic import verify_sums


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """The kernel refuses to let any file grow past `room` bytes, here and in processes started meanwhile."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def uf(*arguments: object):
    from command_line import uf as run  # beside the tests of the command line

    return run(*arguments)


def test_fault_08_disk_full_merge(exported, copy_of, tmp_path):
    """The model that was there before is still whole; nothing half-written stays."""
    target = copy_of(exported.merged, "m", sums=True)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    for room in (0, 3000, 300_000):
        with full_disk(room), pytest.raises(UserError, match="cannot be written: File too large"):
            merge(exported.base, exported.adapter, target, MergeOptions(overwrite=True))
        assert os.listdir(tmp_path) == ["m"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_fault_08_disk_full_convert(exported, tmp_path):
    (tmp_path / "old-f16.gguf").write_bytes(b"old")
    with full_disk(300_000), pytest.raises(UserError, match="converter: the file cannot be written, the disk is full"):
        convert(exported.merged, tmp_path / "old-f16.gguf", GgufOptions(check=False))
    assert os.listdir(tmp_path) == ["old-f16.gguf"]
    assert (tmp_path / "old-f16.gguf").read_bytes() == b"old"


@pytest.mark.parametrize("room", [20_000, 200_000, 1_000_000])
def test_fault_08_disk_full_quantise(exported, tmp_path, room):
    with full_disk(room), pytest.raises(UserError, match="the disk is full or broken|File too large"):
        quantize(exported.gguf, tmp_path / "q", ["q8_0"], threads=1)
    assert os.listdir(tmp_path / "q") == []
    (result,) = quantize(exported.gguf, tmp_path / "q", ["q8_0"], threads=1)
    assert result.path.read_bytes() == exported.quantized.read_bytes()
    assert verify_sums(tmp_path / "q") == []


def test_fault_09_too_little_disk_before_the_start(exported, tmp_path, monkeypatch):
    """Every step asks first: training for its checkpoints, exports for their files, a plan for all of them."""
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"the merged model needs 0.07 GiB .* 0.00 GiB are free"):
        merge(exported.base, exported.adapter, tmp_path / "m", MergeOptions())
    with pytest.raises(UserError, match="the f16 GGUF file needs"):
        convert(exported.merged, tmp_path / "x.gguf", GgufOptions())
    with pytest.raises(UserError, match="quantising to q8_0, q4_0 needs"):
        quantize(exported.gguf, tmp_path / "q", ["q8_0", "q4_0"])
    assert os.listdir(tmp_path) == []
    data = exported.home / "rows.jsonl"
    flags = ("--batch_size", 2, "--accumulation_steps", 1, "--max_steps", 4, "--val_split", 0, "--forgetting", "off")
    trained = uf("sft", "--model", exported.base, "--dataset", data, "--output_dir", tmp_path / "run", *flags)
    assert (trained.code, "checkpoints needs" in trained.err) == (1, True), trained.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        f"model: {exported.base}\ndataset: {data}\nmax_steps: 2\noutput_dir: {tmp_path / 'planned'}\n"
        "stages: [sft, merge, gguf, {quantize: {types: 'q4_k_m,q8_0'}}]\n"
    )
    planned = uf("run", plan)
    assert planned.code == 1
    assert "What this plan exports (merged model, GGUF and quantised files) needs 0.16 GiB" in planned.err
    assert not (tmp_path / "planned").exists()


def test_fault_17_nan_in_the_base(exported, copy_of, poke, tmp_path, monkeypatch):
    """Refused when it is loaded, merged, linked and converted; the tensor is named."""
    base = copy_of(exported.base, "base")
    poke(base / "model.safetensors", "layers.1.mlp.up_proj.weight", float("nan"))
    foreign = copy_of(exported.adapter, "adapter")
    (foreign / "unsloth_factory.json").unlink()  # or it would be refused as another base's
    message = r"model.layers.1.mlp.up_proj.weight holds NaN or infin"
    with pytest.raises(UserError, match=message):
        load_model(ModelSettings(model=str(base)))
    with pytest.raises(UserError, match=message):
        merge(base, foreign, tmp_path / "m", MergeOptions())
    with pytest.raises(UserError, match=message):
        publish_trained(base, tmp_path / "m")

    class Opened:
        """The converter, ready; it takes seconds to start."""

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None: ...
        def call(self, request: dict, **_: object) -> tuple[dict, bytes]:
            assert request["op"] == "open", "weights went to the converter unchecked"
            return {"pre_tokenizer": "qwen2", "architecture": "Qwen3Model"}, b""

    monkeypatch.setattr(gguf_module, "ChildProcess", Opened)
    with pytest.raises(UserError, match=message):
        convert(base, tmp_path / "x.gguf", GgufOptions())
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_fault_17_nan_in_the_adapter(exported, copy_of, poke, tmp_path, value):
    adapter = copy_of(exported.adapter, "adapter")
    poke(adapter / "adapter_model.safetensors", "0.mlp.down_proj.lora_B.weight", value)
    message = r"0.mlp.down_proj.lora_B.weight holds NaN or infin"
    with pytest.raises(UserError, match=message):
        load_model(ModelSettings(model=str(exported.base), adapter=str(adapter)))
    with pytest.raises(UserError, match=message):
        merge(exported.base, adapter, tmp_path / "m", MergeOptions())
    assert os.listdir(tmp_path) == ["adapter"]


def test_fault_17_nan_in_a_gguf_file(exported, tmp_path):
    data = bytearray(exported.gguf.read_bytes())
    assert read_header(exported.gguf).tensors[-1].type_name == "F32"
    data[-4:] = b"\x00\x00\xc0\x7f"
    path = tmp_path / "n-f16.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"quantising to q8_0: tensor .* has invalid data \(NaN or infinity\)"):
        quantize(path, tmp_path / "q", ["q8_0"], threads=1)
    assert os.listdir(tmp_path / "q") == []
    with pytest.raises(UserError, match=r"llama.cpp with n-f16.gguf"):
        LlamaCpp(path)


def test_fault_35_adapter_of_another_base(exported, copy_of, poke, tmp_path):
    """The same shapes, one other weight: refused by every command, and both bases are named."""
    other = copy_of(exported.base, "other")
    poke(other / "model.safetensors", "norm.weight", 1.5)
    message = r"was trained on .*base \(fingerprint [0-9a-f]{12}\), but --model is .*other \(fingerprint [0-9a-f]{12}\)"
    with pytest.raises(UserError, match=message):
        merge(other, exported.adapter, tmp_path / "m", MergeOptions())
    with pytest.raises(UserError, match=message):
        load_model(ModelSettings(model=str(other), adapter=str(exported.adapter)))
    merged = uf("merge", "--run", exported.run, "--model", other, "--output", tmp_path / "m")
    assert (merged.code, "was trained on" in merged.err, (tmp_path / "m").exists()) == (1, True, False)


KINDS = {
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 4}, "rank_pattern": {"down_proj": 2}},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
}


def peft_adapter(base: Path, folder: Path, **options: object) -> torch.nn.Module:
    """An adapter that peft wrote, with values in B; returns peft's model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(**({"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options))
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_fault_36_adapters_that_gguf_gets_wrong_are_merged_right(random_model_dir, tmp_path, kind):
    """No GGUF adapter is ever written: the merge of rsLoRA, alpha_pattern and trained modules agrees with peft."""
    from transformers import AutoModelForCausalLM

    adapted = peft_adapter(random_model_dir, tmp_path / "a", **KINDS[kind])
    merge(random_model_dir, tmp_path / "a", tmp_path / "m", MergeOptions())
    ids = torch.tensor([[*range(5, 40)]])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, found = (model(ids).logits.log_softmax(-1) for model in (adapted, merged))
        with adapted.disable_adapter():
            base = adapted(ids).logits.log_softmax(-1)
    assert (found - expected).abs().max() < 0.01
    assert (base - expected).abs().max() > 0.1  # the adapter does change the answers


def test_fault_36_dora_is_refused(random_model_dir, tmp_path):
    """DoRA is refused, with the way to merge it."""
    peft_adapter(random_model_dir, tmp_path / "a", use_dora=True)
    with pytest.raises(UserError, match=r"cannot merge an adapter with use_dora=True.*merge_and_unload"):
        merge(random_model_dir, tmp_path / "a", tmp_path / "m", MergeOptions())
    assert os.listdir(tmp_path) == ["a"]
    refused = uf("gguf", "--adapter", tmp_path / "a", "--output", tmp_path / "x.gguf")
    assert refused.code == 2  # there is no GGUF file of an adapter
