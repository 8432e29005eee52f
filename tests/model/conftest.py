"""Tiny random models of each family, made once, and ways to damage a copy of one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def family_dir(request, tmp_path_factory, random_model_dir) -> Callable[[str], Path]:
    """Folder of a random 2-layer model of a family."""
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parent.parent / "conftest.py"))
    made = {"qwen3": random_model_dir}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = root.make_random_model(tmp_path_factory.mktemp(family), family=family)
        return made[family]

    return make


@pytest.fixture
def copy_model(random_model_dir, tmp_path) -> Callable[..., Path]:
    """A copy of the random model that a test may damage."""

    def copy(name: str = "copy") -> Path:
        return Path(shutil.copytree(random_model_dir, tmp_path / name))

    return copy


@pytest.fixture
def load(random_model_dir) -> Callable[..., LoadedModel]:
    """`load_model` of the random model, or of `model=`."""

    def call(model: Path | None = None, adapter: Path | None = None, **options: Any) -> LoadedModel:
        settings = ModelSettings(model=str(model or random_model_dir), adapter=str(adapter) if adapter else None)
        return load_model(settings, **options)

    return call


@pytest.fixture
def edit_json() -> Callable[..., None]:
    def edit(path: Path, **changes: Any) -> None:
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | changes), encoding="utf-8")

    return edit


@pytest.fixture
def row() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """(input_ids, position_ids) of documents packed into one row, [1, T]."""

    def make(*documents: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.tensor([[token for document in documents for token in document]])
        positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
        return ids, positions

    return make


@pytest.fixture
def stir() -> Callable[[LoadedModel], LoadedModel]:
    """Give the adapter's B matrices values, as a training would."""

    def change(loaded: LoadedModel) -> LoadedModel:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        return loaded

    return change
