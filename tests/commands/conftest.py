"""One finished run for all tests of the command line: the whole chain on the bundled model, made once."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from command_line import DEMO, NOBODY, SMALL, Chain, write_gbk  # noqa: E402


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """sft to deploy, in a folder whose name has a blank and Chinese."""
    home = tmp_path_factory.mktemp("chain")
    made = Chain(home / "医生 1", write_gbk(home / "data.csv", 40))
    run = ("--run", made.folder)
    job = ("--output_dir", made.folder, "--domain", "medical", "--max_steps", 4, "--val_split", 6, "--save_steps", 2)
    made.run("sft", "sft", "--model", "tiny", "--dataset", made.data, *job, *SMALL)
    made.run("validate", "validate", *run, "--max_new_tokens", 24, "--max_samples", 4)
    made.run(
        "evaluate", "evaluate", *run, "--task_dir", DEMO / "mini_ceval", "--subjects", "law", "--n_shot", 2
    )  # fmt: skip
    made.run(
        "chat", "chat", *run, "--max_new_tokens", 16, "--temperature", 0, stdin="听澜中心在哪里？\nclear\n你好\nexit\n"
    )
    made.run("merge", "merge", *run)
    made.run("gguf", "gguf", *run)
    made.run("quantize", "quantize", *run, "--types", "q4_k_m,q8_0")
    made.run("validate gguf", "validate", *run, "--gguf", "all", "--max_new_tokens", 24, "--max_samples", 4)
    made.run("deploy", "deploy", *run, "--name", "doctor", "--ollama_host", NOBODY)
    return made


@pytest.fixture
def run_copy(chain: Chain, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the finished run, without the parts named."""

    def copy(*without: str) -> Path:
        target = tmp_path / "run"
        shutil.copytree(chain.folder, target, ignore=shutil.ignore_patterns(*without))
        return target

    return copy
