"""What an export hands back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportResult:
    """One finished file or folder."""

    path: Path
    bytes: int
    seconds: float
    figures: dict[str, Any] = field(default_factory=dict)
    """Measured values, JSON-able: differences, token parity, types, notes."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"path": str(self.path), "bytes": self.bytes, "seconds": self.seconds, "figures": self.figures}
