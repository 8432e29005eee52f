"""`uf doctor`: each problem is found, and comes with its fix."""

from __future__ import annotations

import importlib.util
import shutil
from importlib import metadata
from types import SimpleNamespace

import psutil
import pytest
import torch

from unsloth_factory.cli import main
from unsloth_factory.commands import doctor
from unsloth_factory.config.commands import DoctorConfig
from unsloth_factory.export.ollama import OllamaServer

CONFIG = DoctorConfig()


def test_this_machine_can_run_the_tests(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    text = capsys.readouterr().out
    assert code == 0, text
    for word in ("Python", "torch", "NF4 (QLoRA)", "llama.cpp converter", "disk", "Nothing to mend."):
        assert word in text


def test_missing_and_wrong_versions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    requires = ["torch>=2.11", "peft>=99", "no-such-package>=1", 'pytest>=999; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    findings = {f.what: f for f in doctor.check_python(CONFIG)}
    assert findings["torch"].state == "ok"
    assert findings["peft"].state == "problem"
    assert "needed >=99" in findings["peft"].found
    assert findings["no-such-package"].fix == 'pip install "no-such-package>=1"'
    assert "pytest" not in findings
    assert main(["doctor"]) == 1
    assert "2 problems." in capsys.readouterr().out


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    assert [f.state for f in doctor.check_python(CONFIG)] == ["ok", "note"]


def test_a_card_that_torch_cannot_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.Path, "exists", lambda self: False)
    assert next(doctor.check_gpu(CONFIG)).state == "note"
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    finding = next(doctor.check_gpu(CONFIG))
    assert finding.state == "problem"
    assert "CUDA build of torch" in finding.fix


def card_of(monkeypatch: pytest.MonkeyPatch, name: str, gib: tuple[int, int], capability: tuple[int, int]) -> None:
    """As on a machine with this card; memory free and in all."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (gib[0] << 30, gib[1] << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(doctor, "versions", lambda: {"gpu": name, "driver": "580", "cuda": "13.0"})
    monkeypatch.setattr(doctor, "pick_device_dtype", lambda: (None, None, "no bfloat16 units"))


def test_a_card_that_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    card_of(monkeypatch, "Tesla T4", (3, 16), (7, 5))
    card, memory, precision = doctor.check_gpu(CONFIG)
    assert card.found == "Tesla T4, driver 580, CUDA 13.0"
    assert memory.found == "3.0 of 16.0 GiB free"
    assert memory.state == "note"
    assert precision.found == "no bfloat16 units"


def test_a_hopper_gpu_is_told_of_its_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    card_of(monkeypatch, "H100", (70, 80), (9, 0))
    monkeypatch.setattr(doctor, "is_installed", lambda name: False)
    advice = list(doctor.check_gpu(CONFIG))[-1]
    assert advice.state == "note"
    assert "unsloth-factory[hopper]" in advice.fix
    monkeypatch.setattr(doctor, "is_installed", lambda name: name == "flash-attn-4")
    assert list(doctor.check_gpu(CONFIG))[-1].what == "precision"


def test_little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 << 30, total=12 << 30))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 << 30))
    memory, disk = doctor.check_room(CONFIG)
    assert (memory.state, disk.state) == ("note", "note")
    assert memory.found == "2.0 of 12.0 GiB available"
    assert "55 GiB" in disk.fix


def test_export_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for module in ("inference.llama_cpp", "scoring.text"):
        monkeypatch.setattr(f"unsloth_factory.{module}.find_spec", lambda name: None)
    monkeypatch.setattr(
        metadata, "packages_distributions", lambda: {"llama_cpp": ["llama_cpp_python", "llama-cpp-python"]}
    )
    findings = list(doctor.check_export(CONFIG))
    assert all(f.state == "note" and f.fix for f in findings)
    assert "llama-cpp-python" in [f.what for f in findings]


def test_bitsandbytes_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("library not found\nmore")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", broken)
    finding = next(doctor.check_nf4(CONFIG))
    assert (finding.state, finding.found) == ("problem", "library not found")


def test_a_server_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OllamaServer, "version", lambda self: "0.17.1")
    assert next(doctor.check_ollama(CONFIG)).found.startswith("0.17.1 at ")


def test_where_models_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "cache only" in next(doctor.check_network(CONFIG)).found
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert next(doctor.check_network(CONFIG)).found == "a hub id in --model downloads, from https://mirror.example"
