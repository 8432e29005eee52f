"""Are the files still those that were written? The SHA256SUMS beside them says so."""

from __future__ import annotations

from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.run.atomic import SUMS_NAME, read_sums, sha256


def refuse_damaged(folder: Path) -> None:
    """Compare the files of a model or adapter with the SHA256SUMS in its folder, if there is one.

    A flipped byte in weights gives a model that loads and answers, wrongly. Files that the list names and that are not
    there are no matter here: a copy may leave out what is not needed, and the loaders miss what is.

    Raises:
        UserError: A file is not the one that was written.
    """
    for name, digests in read_sums(folder).items():
        if Path(name).name == name and (folder / name).is_file() and sha256(folder / name) not in digests:
            raise UserError(
                f"{folder / name} is not the file that was written: its SHA-256 differs from {SUMS_NAME}. Copy it "
                f"again, or make it again; if you changed it yourself, delete {folder / SUMS_NAME}."
            )
