"""GGUF file -> smaller GGUF files, by llama.cpp's quantiser, with what it really did read back."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.export.progress import say
from unsloth_factory.export.result import ExportResult
from unsloth_factory.export.space import quantized_bytes
from unsloth_factory.export.sums import publish_with_sum, verify_file
from unsloth_factory.inference.child import ChildProcess, child_environment, how_it_ended, memory_limit
from unsloth_factory.inference.gguf_header import TENSOR_TYPES, GgufHeader, read_header
from unsloth_factory.inference.llama_cpp import INSTALL_HINT
from unsloth_factory.run.atomic import exclusive, own_partial, remove_leftovers, require_free_space

# llama_ftype numbers of llama.cpp's public header.
FILE_TYPES = {
    "f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q6_k": 18, "q5_k_m": 17, "q5_k_s": 16, "q5_1": 9, "q5_0": 8,
    "q4_k_m": 15, "q4_k_s": 14, "q4_1": 3, "q4_0": 2, "iq4_nl": 25, "iq4_xs": 30, "q3_k_l": 13, "q3_k_m": 12,
    "q3_k_s": 11, "iq3_m": 27, "iq3_s": 26, "q2_k": 10,
}  # fmt: skip
NEED_IMPORTANCE_MATRIX = ("iq1_m", "iq1_s", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq3_xs", "iq3_xxs", "q2_k_s")
SOURCE_TYPES = {"F32", "F16", "BF16"}
# Tensor type that most matrices of a file type have.
MAIN_TYPES = {
    "q8_0": "Q8_0", "q6_k": "Q6_K", "q5_k_m": "Q5_K", "q5_k_s": "Q5_K", "q5_1": "Q5_1", "q5_0": "Q5_0",
    "q4_k_m": "Q4_K", "q4_k_s": "Q4_K", "q4_1": "Q4_1", "q4_0": "Q4_0", "iq4_nl": "IQ4_NL", "iq4_xs": "IQ4_XS",
    "q3_k_l": "Q3_K", "q3_k_m": "Q3_K", "q3_k_s": "Q3_K", "q2_k": "Q2_K", "iq3_s": "IQ3_S", "iq3_m": "IQ3_S",
    "f16": "F16", "bf16": "BF16", "f32": "F32", "iq1_m": "IQ1_M", "iq1_s": "IQ1_S", "iq2_m": "IQ2_S",
    "iq2_s": "IQ2_XS", "iq2_xs": "IQ2_XS", "iq2_xxs": "IQ2_XXS", "iq3_xs": "IQ3_S", "iq3_xxs": "IQ3_XXS",
    "q2_k_s": "Q2_K",
}  # fmt: skip
TIMEOUT = 4 * 3600.0
FAILED = "failed to quantize:"


def parse_types(text: str, *, imatrix: bool = False) -> list[str]:
    """Type names of `--types q4_0,q4_k_m`; with `imatrix` also those that need an importance matrix.

    Raises:
        UsageError: An unknown type (with the nearest name), or one that needs an importance matrix.
    """
    names = list(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError("--types is empty. Give one or more by commas, such as q4_k_m,q8_0.")
    for name in names:
        if name in NEED_IMPORTANCE_MATRIX:
            if imatrix:
                continue
            raise UsageError(
                f"--types {name}: below 3 bits llama.cpp needs an importance matrix. Add --imatrix (with llama-imatrix "
                "and llama-quantize on the PATH), or use q3_k_m or q2_k."
            )
        if name not in FILE_TYPES:
            near = get_close_matches(name, FILE_TYPES, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise UsageError(f"--types {name}: unknown. {hint}Known: {', '.join(FILE_TYPES)}.")
    return names


@dataclass(frozen=True)
class _Worker:
    """How llama.cpp is run."""

    threads: int
    lock: int
    """Descriptor of the folder's lock."""
    imatrix: Path | None


def quantize(
    source: Path, folder: Path, types: Sequence[str], *, threads: int | None = None, imatrix: Path | None = None
) -> list[ExportResult]:
    """Write one file per type.

    Args:
        source: GGUF file in 32 or 16 bits; checked against the SHA256SUMS beside it.
        folder: Where the files go; names are the source's with its type replaced.
        types: Checked names (`parse_types`).
        threads: CPU threads; default all.
        imatrix: Importance matrix (`imatrix.make_imatrix`), which only the program llama-quantize takes.

    Returns:
        One result per type; figures: types (tensor type -> count), fallbacks (tensors stored in another type than asked
        for, because their rows are no multiple of the block), bits_per_weight.

    Raises:
        UserError: The source is damaged or already quantised, the disk is full, or the quantiser fails or crashes.
    """
    header = read_header(source)
    _refuse_quantized(source, header)
    weights = sum(_elements(tensor.shape) for tensor in header.tensors)
    require_free_space(folder, quantized_bytes(weights, types), f"quantising to {', '.join(types)}")
    verify_file(source)
    workers = threads or os.cpu_count() or 1
    with exclusive(folder, "uf quantize") as lock:
        worker = _Worker(workers, lock, imatrix)
        return [_quantize_one(source, header, folder / quantized_name(source, n), n, worker) for n in types]


def quantized_name(source: Path, type_name: str) -> str:
    """NAME-q4_k_m.gguf of NAME-f16.gguf."""
    stem = source.stem
    for name in ("f16", "bf16", "f32"):
        stem = stem.removesuffix(f"-{name}")
    return f"{stem}-{type_name}.gguf"


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for dimension in shape:
        count *= dimension
    return count


def _refuse_quantized(source: Path, header: GgufHeader) -> None:
    found = sorted(set(header.type_counts()) - SOURCE_TYPES)
    if found:
        raise UserError(
            f"{source} holds {', '.join(found)} tensors: it is quantised already, and quantising again would add a "
            "second rounding. Give the f16 or bf16 file (uf gguf)."
        )


def _quantize_one(source: Path, before: GgufHeader, target: Path, name: str, worker: _Worker) -> ExportResult:
    started = time.monotonic()
    if target.resolve() == source.resolve():
        raise UserError(f"{target}: quantising to {name} would overwrite the source. Give another --output folder.")
    temporary = own_partial(target)
    try:
        remove_leftovers(target)
        _run_quantizer(source, temporary, name, worker)
        after = read_header(temporary)
        if {t.name for t in after.tensors} != {t.name for t in before.tensors}:
            raise UserError(f"{target}: llama.cpp wrote other tensors than the source has. Nothing was kept.")
        publish_with_sum(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    fallbacks = find_fallbacks(after, name)
    size = target.stat().st_size
    weights = sum(_elements(tensor.shape) for tensor in after.tensors)
    figures: dict[str, Any] = {
        "type": name,
        "types": after.type_counts(),
        "fallbacks": fallbacks,
        "bits_per_weight": 8 * size / weights,
        "imatrix": str(worker.imatrix) if worker.imatrix else None,
    }
    types = ", ".join(f"{n} x {kind}" for kind, n in figures["types"].items())
    say(f"{name}: {figures['bits_per_weight']:.2f} bits a weight; tensors {types}")
    if fallbacks:
        example = next(iter(fallbacks))
        say(
            f"{len(fallbacks)} tensors are stored in another type than {name} asks for, because their rows are "
            f"no multiple of its blocks: {example} as {fallbacks[example]} ...",
            warn=True,
        )
    return ExportResult(target, size, time.monotonic() - started, figures)


def find_fallbacks(header: GgufHeader, name: str) -> dict[str, str]:
    """Tensor -> stored type, for matrices whose rows do not fit the block of the type asked for.

    llama.cpp then takes another type without a word (q6_k: 14 of 16 tensors as Q8_0 at a row length of 128).
    """
    block = next(block for kind, block, _ in TENSOR_TYPES.values() if kind == MAIN_TYPES[name])
    return {
        tensor.name: tensor.type_name
        for tensor in header.tensors
        if len(tensor.shape) > 1 and tensor.shape[0] % block and tensor.type_name not in (MAIN_TYPES[name], "F32")
    }


def _run_quantizer(source: Path, temporary: Path, name: str, worker: _Worker) -> None:
    """Cyllama in a child process; `llama-quantize` with an importance matrix, or when that is all there is."""
    if worker.imatrix or find_spec("cyllama") is None:
        _run_program(source, temporary, name, worker)
        return
    memory = memory_limit(source.stat().st_size)
    module = "unsloth_factory.export.quantize_child"
    with ChildProcess(module, f"quantising to {name}", memory=memory, inherited=(worker.lock,)) as child:
        request = {"op": "quantize", "source": str(source.resolve()), "target": str(temporary.resolve())}
        try:
            child.call(request | {"ftype": FILE_TYPES[name], "threads": worker.threads}, timeout=TIMEOUT)
        except UserError as error:
            raise _explained(error, name, child.log_tail(40)) from None


def _run_program(source: Path, temporary: Path, name: str, worker: _Worker) -> None:
    program = shutil.which("llama-quantize")
    if program is None:
        raise UserError(f"quantising needs cyllama or llama-quantize, and neither is installed. {INSTALL_HINT}")
    weights = ["--imatrix", str(worker.imatrix.resolve())] if worker.imatrix else []
    command = [program, *weights, str(source.resolve()), str(temporary.resolve()), name.upper(), str(worker.threads)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            env=child_environment(),
            timeout=TIMEOUT,
            pass_fds=(worker.lock,),
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{program}: not done after {TIMEOUT / 3600:.0f} hours, stopped.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        error = UserError(f"quantising to {name}: {program} {how_it_ended(done.returncode)}: {last}")
        raise _explained(error, name, done.stderr)


def _explained(error: UserError, name: str, log: str) -> UserError:
    """llama.cpp gives no more than a code; what was wrong stands in its log, in C++'s words."""
    reason = next((line.split(FAILED, 1)[1].strip() for line in log.splitlines() if FAILED in line), None)
    if reason is None:
        return error
    if "iostream" in reason or "ios_base" in reason:
        return UserError(f"quantising to {name}: the file cannot be written, the disk is full or broken ({reason}).")
    if "invalid data" in reason:
        return UserError(
            f"quantising to {name}: {reason} (NaN or infinity). Merge and convert again: uf merge, uf gguf."
        )
    return UserError(f"quantising to {name}: {reason}")
