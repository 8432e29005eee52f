"""The run folder: the one memory of a training that every later command reads."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from unsloth_factory.config.errors import UserError
from unsloth_factory.run.atomic import write_text

LOCK_NAME = ".lock"
MAX_BYTES = 1 << 20  # of a run.yaml; real ones have 5 KB
Thinking = Literal["on", "off", "unset"]


@dataclass(frozen=True, kw_only=True)
class RunManifest:
    """What a later command must know of a training; stored as run.yaml."""

    command: str
    model: str
    """Folder or hub id of the base model."""
    base_fingerprint: str
    finetuning_type: str = "lora"
    quantization_bit: int | None = None
    thinking: Thinking = "unset"
    """Mode of the training prompts; chat, validation and export use the same."""
    domain: str | None = None
    system: str | None = None
    max_seq_length: int = 2048
    chat_template_sha256: str = ""
    seed: int = 3407
    config: dict[str, Any] = field(default_factory=dict)
    """All settings of the command, nested by group."""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def thinking_flag(self) -> bool | None:
        """`enable_thinking` of the chat template: True, False, or None for unset."""
        return {"on": True, "off": False, "unset": None}[self.thinking]


@dataclass(frozen=True)
class RunFolder:
    """Paths and manifest of one run. Nothing is created until something is written."""

    path: Path

    manifest = property(lambda self: self.path / "run.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    generations = property(lambda self: self.path / "generations.jsonl")
    data_report = property(lambda self: self.path / "data_report.json")
    loss_plot = property(lambda self: self.path / "training_loss.png")
    final_adapter = property(lambda self: self.path / "final_adapter")
    final_model = property(lambda self: self.path / "final_model")
    template = property(lambda self: self.path / "chat_template.jinja")
    validation_split = property(lambda self: self.path / "validation_split.jsonl")
    validation_results = property(lambda self: self.path / "validation_results")
    evaluation_results = property(lambda self: self.path / "evaluation_results")
    quality_results = property(lambda self: self.path / "quality_results")
    picked_file = property(lambda self: self.path / "quality_results" / "picked.json")
    merged_model = property(lambda self: self.path / "merged_model")
    gguf = property(lambda self: self.path / "gguf")
    modelfile = property(lambda self: self.path / "Modelfile")
    report = property(lambda self: self.path / "report.html")

    def read(self) -> RunManifest:
        """Read run.yaml.

        Raises:
            UserError: The folder has none, or one that this version cannot read.
        """
        if not self.manifest.is_file():
            raise UserError(f"--run {self.path}: not a run folder (it has no run.yaml); give the folder of a training")
        try:
            if self.manifest.stat().st_size > MAX_BYTES:
                raise UserError(
                    f"{self.manifest} has {self.manifest.stat().st_size} bytes; at most {MAX_BYTES} are read"
                )
            values = yaml.safe_load(self.manifest.read_text(encoding="utf-8"))
            known = {f.name for f in fields(RunManifest)}
            return RunManifest(**{key: value for key, value in values.items() if key in known})
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError, TypeError, AttributeError) as error:
            raise UserError(f"{self.manifest} cannot be read: {error}") from error

    def write(self, manifest: RunManifest) -> None:
        """Write run.yaml atomically."""
        write_text(self.manifest, yaml.safe_dump(asdict(manifest), allow_unicode=True, sort_keys=False))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder against a second training; the kernel frees it when the process ends, however it ends.

        A folder that was made for a training which failed before it wrote anything is removed again.

        Raises:
            UserError: Another process holds it, or nothing can be written there.
        """
        made = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / LOCK_NAME, "w", encoding="utf-8")  # noqa: SIM115 (closed below)
        except OSError as error:
            raise UserError(
                f"--output_dir {self.path} cannot be used ({error.strerror or error}). Name a folder that can be "
                "written, or one that does not exist yet."
            ) from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"{self.path} is in use by another training. Wait for it, or give --output_dir another folder."
                ) from error
            try:
                yield
            finally:
                if made and [path.name for path in self.path.iterdir()] == [LOCK_NAME]:
                    (self.path / LOCK_NAME).unlink()
                    self.path.rmdir()
