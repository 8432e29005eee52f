"""Quantised files hold what their name says, or the difference is reported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export import quantize as module
from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.export.quantize import parse_types, quantize, quantized_name
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.gguf_header import GgufHeader
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.run.atomic import verify_sums

REQUIRED = {"q4_0": "Q4_0", "q4_k_m": "Q4_K", "q5_k_m": "Q5_K", "q6_k": "Q6_K", "q8_0": "Q8_0"}


@pytest.fixture
def source(gguf_result, tmp_path) -> Path:
    shutil.copytree(gguf_result.path.parent, tmp_path / "g")
    return tmp_path / "g" / gguf_result.path.name


def test_the_required_types(source):
    results = quantize(source, source.parent, list(REQUIRED), threads=1)
    sizes = []
    for result, (name, main) in zip(results, REQUIRED.items(), strict=True):
        assert result.path.name == f"demo-{name}.gguf"
        assert max(result.figures["types"], key=result.figures["types"].get) in (main, "F32")
        assert result.figures["types"][main] >= 13
        assert result.figures["fallbacks"] == {}
        sizes.append(result.bytes)
    assert sizes == sorted(sizes)
    assert verify_sums(source.parent) == []
    with LlamaCpp(results[1].path) as llama:
        assert len(llama.generate([5, 6, 7], 5).ids) == 5
    with pytest.raises(UserError, match="quantised already"):
        quantize(results[0].path, source.parent, ["q8_0"])


def test_silent_fallbacks_are_reported(random_model_dir, tmp_path, capsys):
    """Rows of 64 and 128 are no multiple of 256: llama.cpp takes other types without a word."""
    source = convert(random_model_dir, tmp_path / "s-f16.gguf", GgufOptions(check=False)).path
    (result,) = quantize(source, tmp_path / "out", ["q6_k"], threads=1)
    assert len(result.figures["fallbacks"]) > 10
    assert set(result.figures["fallbacks"].values()) == {"Q8_0"}
    assert "no multiple of its blocks" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ("iq2_xxs", "importance matrix"),
        ("q4_km", "Did you mean q4_k_m"),
        ("", "is empty"),
        ("q8_0,zzz", "zzz: unknown"),
    ],
)
def test_types_are_checked_first(types, message):
    with pytest.raises(UsageError, match=message):
        parse_types(types)


def test_names():
    assert parse_types("Q4_0, q8_0,q4_0") == ["q4_0", "q8_0"]
    assert quantized_name(Path("a/my-f16-model-f16.gguf"), "q4_0") == "my-f16-model-q4_0.gguf"


def test_flipped_bytes_are_found(source):
    data = bytearray(source.read_bytes())
    data[len(data) // 2] ^= 0xFF
    source.write_bytes(bytes(data))
    with pytest.raises(UserError, match="is not the file that was exported"):
        quantize(source, source.parent, ["q8_0"])
    with pytest.raises(UserError, match="SHA-256 differs"):
        verify_file(source)


def test_crash_of_the_quantiser(source, monkeypatch):
    monkeypatch.setitem(module.FILE_TYPES, "q8_0", 999)
    with pytest.raises(UserError, match="quantising to q8_0"):
        quantize(source, source.parent / "out", ["q8_0"])
    assert list((source.parent / "out").iterdir()) == []


def test_full_and_small_disk(source, monkeypatch):
    out = source.parent / "out"

    def failing(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "publish_with_sum", failing)
        with pytest.raises(UserError, match="No space left"):
            quantize(source, out, ["q8_0"])
    assert list(out.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match="quantising to q8_0, q4_0 needs"):
        quantize(source, out, ["q8_0", "q4_0"])


def test_another_tensor_list_is_refused(source, monkeypatch):
    real = module.read_header

    def fewer(path):
        header = real(path)
        return GgufHeader(3, header.metadata, header.tensors[1:]) if "partial" in path.name else header

    monkeypatch.setattr(module, "read_header", fewer)
    with pytest.raises(UserError, match="other tensors"):
        quantize(source, source.parent, ["q8_0"])
    assert not (source.parent / "demo-q8_0.gguf").exists()
