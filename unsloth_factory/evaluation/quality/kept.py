"""Token scores of measured files, kept on disk: another gate, or one more file, does not measure them all again."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from unsloth_factory.data.types import TokenSample
from unsloth_factory.evaluation.quality.token_scores import TokenScores
from unsloth_factory.run.atomic import write_bytes

FORMAT = 1
"""Raised when the way of measuring changes: older files are then computed anew."""


class KeptQuality:
    """Scores under a hash of all that they depend on: both files, the engine, and the token ids that were read.

    Args:
        folder: Where they lie; made when the first is written.
        reference: SHA-256 of the 16-bit file.
        engine: Name and version.
        samples: What is read.
    """

    def __init__(self, folder: Path, reference: str, engine: str, samples: Sequence[TokenSample]) -> None:
        self._folder = folder
        digest = hashlib.sha256(json.dumps([FORMAT, reference, engine]).encode())
        for sample in samples:
            digest.update(len(sample.ids).to_bytes(8, "little"))
            digest.update(sample.ids.astype("<i8").tobytes() + sample.trained.tobytes())
        self._known = digest.hexdigest()
        self._tokens = sum(int(sample.trained[1:].sum()) for sample in samples)

    def read(self, sha256: str) -> TokenScores | None:
        """Scores of the file with that hash, None where there are none or they are damaged."""
        try:
            with np.load(self._path(sha256)) as kept:
                scores = TokenScores(**{field.name: kept[field.name] for field in fields(TokenScores)})
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        return scores if all(len(array) == self._tokens for array in scores.arrays().values()) else None

    def write(self, sha256: str, scores: TokenScores) -> None:
        """Keep the scores of a file."""
        packed = io.BytesIO()
        np.savez_compressed(packed, **scores.arrays())
        self._folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self._path(sha256), packed.getvalue())

    def _path(self, sha256: str) -> Path:
        key = hashlib.sha256(f"{self._known} {sha256}".encode()).hexdigest()
        return self._folder / f"{key[:32]}.npz"
