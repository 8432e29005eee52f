"""The configurations that `uf plan` was compared with measurement on, by benchmarks/plan_accuracy.py."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

STEPS, FAST_STEPS, ACCUMULATION = 8, 24, 2


@dataclass(frozen=True)
class Case:
    """One configuration. `length` is that of every sample, or the longest of a log-normal mix (`mixed`)."""

    name: str
    model: str
    kind: str
    """qlora, lora, full, freeze."""
    length: int
    batch: int
    checkpointing: bool
    optimizer: str = "adamw_8bit"
    mixed: bool = False
    method: str = "sft"
    packing: bool = True
    engine: str = "standard"
    cap_gib: float | None = None
    """Of the card's memory; None: all of it."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return FAST_STEPS if self.engine == "auto" else STEPS

    def flags(self, model: Path, data: Path) -> list[str]:
        """The settings, as `uf sft` and `uf plan` take them."""
        words = ["--model", str(model), "--dataset", str(data), "--max_seq_length", str(self.length)]
        words += ["--batch_size", str(self.batch), "--accumulation_steps", str(ACCUMULATION)]
        words += ["--max_steps", str(self.steps), "--val_split", "0", "--optimizer", self.optimizer]
        words += ["--engine", self.engine]
        words += ["--max_memory", f"{self.cap_gib}GiB"] if self.cap_gib else []
        words += {"qlora": ["--quantization_bit", "4"], "lora": ["--no_quantization"]}.get(
            self.kind, ["--finetuning_type", self.kind]
        )
        words += [] if self.checkpointing else ["--no_gradient_checkpointing"]
        return words + ([] if self.packing else ["--no_packing"])


VALIDATION = (
    Case("v01", "1.7B", "qlora", 2048, 1, True),
    Case("v02", "1.7B", "lora", 1024, 4, False),
    Case("v03", "1.7B", "full", 1024, 2, True, "adamw"),
    Case("v04", "1.7B", "full", 2048, 1, False),
    Case("v05", "4B", "qlora", 1024, 2, True),
    Case("v06", "4B", "lora", 4096, 1, True),
    Case("v07", "4B", "qlora", 2048, 2, False),
    Case("v08", "4B", "full", 512, 2, True),
    Case("v09", "8B", "qlora", 1024, 4, True, mixed=True),
    Case("v10", "8B", "qlora", 2048, 1, False),
    Case("v11", "8B", "lora", 8192, 1, True),
    Case("v12", "8B", "lora", 1024, 2, False),
)
LATER_VALIDATION = (
    Case("w01", "0.6B", "lora", 2048, 8, True),
    Case("w02", "1.7B", "qlora", 2048, 4, True),
    Case("w03", "1.7B", "full", 2048, 4, True),
    Case("w04", "1.7B", "lora", 4096, 2, False),
    Case("w05", "4B", "qlora", 2048, 4, True, mixed=True),
    Case("w06", "4B", "full", 1024, 4, True),
    Case("w07", "4B", "lora", 2048, 2, False),
    Case("w08", "4B", "qlora", 8192, 1, True),
    Case("w09", "8B", "qlora", 2048, 1, True),
    Case("w10", "8B", "qlora", 2048, 4, True),
    Case("w11", "8B", "lora", 4096, 2, True),
    Case("w12", "8B", "qlora", 4096, 1, False),
    Case("x01", "8B", "qlora", 1024, 2, True),
    Case("x02", "8B", "qlora", 1024, 1, False),
    Case("x03", "4B", "qlora", 2048, 1, True),
)
"""Measured after the model of speed had been fitted to all others."""
AUTO = tuple(
    replace(case, name=f"a{case.name[1:]}", engine="auto", cap_gib=14.2 if case.name in ("w05", "w10") else None)
    for case in LATER_VALIDATION[:12]
)
"""The same through --engine auto, which takes the fast engine for all but full training; two on a small card."""
CALIBRATION = (
    Case("c1", "1.7B", "qlora", 512, 1, True),
    Case("c2", "1.7B", "full", 2048, 2, True, "adamw"),
    Case("c3", "4B", "qlora", 1024, 1, False),
    Case("c4", "4B", "lora", 2048, 4, True),
    Case("c5", "4B", "full", 1024, 1, False),
    Case("c6", "8B", "qlora", 2048, 2, True),
    Case("c7", "8B", "lora", 2048, 1, False),
    Case("c8", "1.7B", "lora", 1024, 8, True, mixed=True),
    Case("c9", "1.7B", "qlora", 512, 2, True, method="dpo"),
)
FAST_CALIBRATION = (
    Case("f1", "1.7B", "qlora", 2048, 4, True, engine="auto"),
    Case("f2", "4B", "qlora", 1024, 2, True, engine="auto"),
    Case("f3", "4B", "lora", 4096, 1, True, engine="auto"),
    Case("f4", "8B", "qlora", 2048, 1, True, engine="auto"),
    Case("f5", "8B", "lora", 1024, 4, True, mixed=True, engine="auto"),
    Case("f6", "8B", "qlora", 2048, 4, True, mixed=True, engine="auto", cap_gib=14.2),
)
TINY_CASES = (
    Case("t1", "tiny", "lora", 64, 2, True),
    Case("t2", "tiny", "full", 64, 1, False, "adamw", mixed=True),
    Case("t3", "tiny", "lora", 64, 1, True, method="dpo"),
)
CASES = {
    case.name: case for case in (*VALIDATION, *LATER_VALIDATION, *AUTO, *CALIBRATION, *FAST_CALIBRATION, *TINY_CASES)
}
