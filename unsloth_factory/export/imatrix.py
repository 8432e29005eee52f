"""Which weights the training text really uses: an importance matrix, by llama.cpp's own `llama-imatrix`.

For each input column of a weight matrix it holds the mean square of what flows in while the model reads the text; the
quantiser then rounds so that the error weighted with it is smallest. The prebuilt libraries offer no way to give it to
the quantiser, so that both programs must be on the PATH (they come with any build of llama.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from unsloth_factory.config.errors import UserError
from unsloth_factory.export.progress import say
from unsloth_factory.export.result import ExportResult
from unsloth_factory.inference.child import child_environment, how_it_ended
from unsloth_factory.run.atomic import own_partial, publish_file, remove_leftovers

PROGRAMS = ("llama-imatrix", "llama-quantize")
PIECE = 512
"""Tokens that are read together."""
SHORTEST_PIECE = 32
PIECES = 100
"""More text changes the matrix little: llama.cpp's users take 100 to 200 pieces."""
TIMEOUT = 12 * 3600.0
QUOTED = 3  # lines of a failed program's output


def find_programs() -> dict[str, str]:
    """Paths of llama-imatrix and llama-quantize.

    Raises:
        UserError: One is not on the PATH.
    """
    found = {name: shutil.which(name) for name in PROGRAMS}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise UserError(
            f"--imatrix needs {' and '.join(missing)} on the PATH. Build llama.cpp (cmake -B build && cmake --build "
            f"build --target {' '.join(PROGRAMS)}) and add build/bin to the PATH, or quantise without --imatrix."
        )
    return {name: str(path) for name, path in found.items()}


def make_imatrix(
    source: Path, text: str, tokens: int, output: Path, *, threads: int | None = None, pieces: int = PIECES
) -> ExportResult:
    """Let the 16-bit file read the training text and write the matrix.

    Args:
        source: GGUF file in 16 or 32 bits.
        text: Rendered conversations, control tokens included.
        tokens: About how many tokens that is.
        output: File of the matrix, in GGUF; its folder is made.
        threads: CPU threads; default all.
        pieces: Most pieces of 512 tokens that are read.

    Returns:
        The result; figures: pieces, tokens_of_a_piece.

    Raises:
        UserError: The text is too short, or the program is missing or fails.
    """
    program = find_programs()["llama-imatrix"]
    # The program wants two pieces at least; a tenth is left for what its tokenizer counts otherwise.
    piece = min(PIECE, int(0.9 * tokens) // 2)
    if piece < SHORTEST_PIECE:
        raise UserError(
            f"--imatrix: the training text has about {tokens} tokens; at least {int(2.3 * SHORTEST_PIECE)} are needed. "
            "Quantise without --imatrix."
        )
    started = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    temporary = own_partial(output)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt", dir=output.parent) as file:
        file.write(text)
        file.flush()
        command = [program, "-m", str(source.resolve()), "-f", file.name, "-o", str(temporary.resolve())]
        command += ["--output-format", "gguf", "--parse-special", "--no-ppl", "-c", str(piece)]
        command += ["--chunks", str(pieces), "-t", str(threads or os.cpu_count() or 1)]
        try:
            _run(command)
            if not temporary.is_file():
                raise UserError(f"{program} ended well but wrote no matrix. Is it older than 2025? Update llama.cpp.")
            publish_file(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    read = min(pieces, tokens // piece)
    say(f"importance matrix of {read} pieces of {piece} tokens of the training text: {output}")
    figures = {"pieces": read, "tokens_of_a_piece": piece}
    return ExportResult(output, output.stat().st_size, time.monotonic() - started, figures)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=child_environment(), timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: not done after {TIMEOUT / 3600:.0f} hours, stopped.") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = " / ".join(lines[-QUOTED:]) or "no output"
        raise UserError(f"importance matrix: {command[0]} {how_it_ended(done.returncode)}: {last}")
