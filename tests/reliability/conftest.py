"""One small run from data to Ollama, made once for the rows about exports and security.

Everything about it is unfriendly on purpose: the run's name is a shell command, secrets stand in the environment, and
the base model's folder holds pickles and Python files that leave a mark when somebody runs them.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "commands"))

from command_line import NOBODY, Outcome, uf  # noqa: E402

RUN_NAME = "; touch pwned $(touch pwned) `touch pwned` & 'q' 模型"
CANARY = "canary0f2b71d4c9e8"
SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "MODELSCOPE_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD")
JOB = (
    "--max_steps", 2, "--batch_size", 2, "--accumulation_steps", 1, "--max_seq_length", 128, "--lora_r", 4,
    "--val_split", 2, "--sample_generations", 0, "--forgetting", "off", "--eval_steps", 2, "--save_steps", 1,
    "--learning_rate", "4e-3",
)  # fmt: skip


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@dataclass
class Exported:
    """The finished run and what each command printed."""

    home: Path
    base: Path
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    canary: str = CANARY
    secrets: tuple[str, ...] = SECRETS
    job: tuple[object, ...] = JOB

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.home / RUN_NAME

    @property
    def marker(self) -> Path:
        """What code of the model's folder would create."""
        return self.home / "code_of_the_model_ran"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter."""
        return self.run / "final_adapter"

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.run / "merged_model"

    @property
    def gguf(self) -> Path:
        """The f16 file."""
        return next((self.run / "gguf").glob("*-f16.gguf"))

    @property
    def quantized(self) -> Path:
        """The q8_0 file."""
        return next((self.run / "gguf").glob("*-q8_0.gguf"))

    def command(self, label: str, *arguments: object) -> None:
        """Run one command line, which must succeed."""
        outcome = self.outcomes[label] = uf(*arguments)
        assert outcome.code == 0, f"uf {label}\n{outcome.out}\n{outcome.err}"


def plant_code(folder: Path, marker: Path) -> None:
    """Pickles and modules with the names that loaders look for; running one of them creates `marker`."""
    bomb = pickle.dumps(Bomb(marker))
    for name in ("pytorch_model.bin", "adapter_model.bin", "rng_state.pth", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(bomb)
    code = f"import os\nos.makedirs({str(marker)!r}, exist_ok=True)\n"
    for name in ("modeling_evil.py", "tokenization_evil.py", "configuration_evil.py", "generate.py", "setup.py"):
        (folder / name).write_text(code, encoding="utf-8")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Exported:
    """sft, merge, gguf, quantize and deploy on a random model."""
    home = tmp_path_factory.mktemp("exported")
    root = request.config.pluginmanager.get_plugin(str(Path(__file__).resolve().parents[1] / "conftest.py"))
    made = Exported(home, root.make_random_model(home / "base", hidden=256))
    plant_code(made.base, made.marker)
    rows = [{"instruction": f"第{i}号柜里放着什么？", "output": f"放着{i}本书。"} for i in range(8)]
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for name in SECRETS:
            patch.setenv(name, CANARY)
        mask = os.umask(0o022)
        made.command("sft", "sft", "--model", made.base, "--dataset", data, "--output_dir", made.run, *JOB)
        made.command("merge", "merge", "--run", made.run)
        made.command("gguf", "gguf", "--run", made.run)
        made.command("quantize", "quantize", "--run", made.run, "--types", "q8_0")
        made.command("deploy", "deploy", "--run", made.run, "--name", "x", "--ollama_host", NOBODY)
        os.umask(mask)
    return made


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of a folder that a test may damage; without the checksums that would tell, unless asked."""

    def copy(folder: Path, name: str, *, sums: bool = False) -> Path:
        ignored = shutil.ignore_patterns(*([] if sums else ["SHA256SUMS"]))
        return Path(shutil.copytree(folder, tmp_path / name, ignore=ignored))

    return copy


@pytest.fixture
def poke() -> Callable[..., None]:
    """Sets one value of a tensor in a safetensors file; the name may be its end."""

    def change(path: Path, name: str, value: float) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        tensors[next(key for key in sorted(tensors) if key.endswith(name))].view(-1)[5] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return change
