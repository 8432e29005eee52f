"""GGUF files of the bundled model, made once for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_ggufs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model as f16, q8_0 and q4_0 files in one folder, by type."""
    from unsloth_factory.export.gguf import GgufOptions, convert
    from unsloth_factory.export.quantize import quantize

    folder = tmp_path_factory.mktemp("tiny_gguf")
    source = convert(tiny_model_dir, folder / "tiny-f16.gguf", GgufOptions(check=False)).path
    made = quantize(source, folder, ["q8_0", "q4_0"], threads=1)
    return {"f16": source, **{result.figures["type"]: result.path for result in made}}
