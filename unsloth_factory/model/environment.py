"""Versions and hardware, for manifests and bug reports."""

from __future__ import annotations

import platform
from importlib import metadata

PACKAGES = (
    "unsloth-factory",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "tokenizers",
)
FLASH_ATTENTION_4 = "flash-attn-4"
"""Attention on Hopper GPUs; named where it is installed. (The module `flash_attn` may be version 2.)"""


def package_version(name: str) -> str:
    """Installed version of a distribution, or "not installed"."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def is_installed(name: str) -> bool:
    """Whether a distribution is there; nothing is imported."""
    return package_version(name) != "not installed"


def versions() -> dict[str, str]:
    """Python, the libraries that decide numbers, CUDA, GPU and driver, as text; no paths, no host name."""
    import torch

    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    found |= {name: package_version(name) for name in PACKAGES}
    found |= {name: package_version(name) for name in (FLASH_ATTENTION_4,) if is_installed(name)}
    found["torch"] = str(torch.__version__)
    found["cuda"] = str(torch.version.cuda or "none")
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        capability = torch.cuda.get_device_capability(device)
        found["gpu"] = torch.cuda.get_device_name(device)
        found["compute_capability"] = f"{capability[0]}.{capability[1]}"
        found["gpu_memory_gib"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.1f}"
        found["driver"] = _driver_version()
    else:
        found["gpu"] = "none"
    return found


def _driver_version() -> str:
    """NVIDIA driver as the kernel module reports it; there is no torch call for it."""
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return "unknown"
    return next((word for word in words if word[:1].isdigit() and "." in word), "unknown")
