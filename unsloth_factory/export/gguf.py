"""Merged model -> GGUF file, by llama.cpp's own converter, checked against transformers before it is published."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.export.converter import find_converter, known_pre_tokenizer
from unsloth_factory.export.parity import ParityProbe, check_parity
from unsloth_factory.export.progress import byte_progress, say
from unsloth_factory.export.result import ExportResult
from unsloth_factory.export.space import gguf_bytes, stored_weights
from unsloth_factory.export.sums import publish_with_sum, write_folder_sums
from unsloth_factory.export.weights import WeightFolder
from unsloth_factory.inference.child import ChildProcess, memory_limit
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.model.finite import FLOAT_DTYPES, is_finite
from unsloth_factory.model.integrity import refuse_damaged
from unsloth_factory.model.paths import check_model_folder
from unsloth_factory.model.weight_files import read_json, shard_paths, tensor_entries
from unsloth_factory.run.atomic import exclusive, own_partial, remove_leftovers, require_free_space, write_json

FLOAT16_MAX = 65504.0
CONVERT_TIMEOUT = 4 * 3600.0
PARITY_NAME = "parity.json"


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """How the file is made and checked."""

    outtype: str = "f16"
    llama_cpp: str | None = None
    check: bool = True
    thinking: str = "unset"
    """Mode of the training prompts: on, off or unset."""
    system: str | None = None
    questions: tuple[tuple[Turn, ...], ...] = ()
    """Held-out prompts of the run, asked in the check beside the fixed ones."""
    name: str = ""
    """Name written into the file."""


def convert(model: Path, output: Path, options: GgufOptions) -> ExportResult:
    """Convert and check; the file gets its name when every gate is passed.

    Args:
        model: Folder of the merged model (16/32-bit safetensors).
        output: GGUF file; `parity.json` and SHA256SUMS are written beside it.
        options: See GgufOptions.

    Returns:
        The result; figures: converter, pre_tokenizer, types, and those of `parity.check_parity`.

    Raises:
        UserError: The model cannot be converted, does not fit the disk, or fails a gate (the file is then removed;
            parity.json keeps what was measured).
    """
    started = time.monotonic()
    converter, version = find_converter(options.llama_cpp)
    check_model_folder(model)
    if "quantization_config" in read_json(model / "config.json"):
        raise UserError(f"{model} holds quantised weights, which cannot be converted. Merge first: uf merge.")
    refuse_damaged(model)
    temporary = own_partial(output)
    needed = gguf_bytes(stored_weights(model), options.outtype)
    require_free_space(output.parent, needed, f"the {options.outtype} GGUF file")
    with exclusive(output.parent, "uf gguf") as lock:
        remove_leftovers(output)
        try:
            figures = _convert(converter, model, temporary, options, lock) | {"converter": version}
            if options.check:
                figures |= _check(temporary, model, output, options)
            publish_with_sum(temporary, output)
            if options.check:
                _record(output, figures | {"passed": True})
        except OSError as error:
            raise UserError(f"{output} cannot be written: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
    return ExportResult(output, output.stat().st_size, time.monotonic() - started, figures)


def _convert(converter: Path, model: Path, temporary: Path, options: GgufOptions, lock: int) -> dict[str, Any]:
    byte_level, fallback, reason = known_pre_tokenizer(model)
    memory = memory_limit(sum(path.stat().st_size for path in shard_paths(model)))
    name = "unsloth_factory.export.convert_child"
    with ChildProcess(name, "llama.cpp's converter", memory=memory, inherited=(lock,)) as child:
        request: dict[str, Any] = {"op": "open", "converter": str(converter), "model": str(model.resolve())}
        request |= {"byte_level_bpe": byte_level, "fallback": fallback, "reason": reason}
        opened, _ = child.call(request, timeout=300)
        _check_values(model, options.outtype)
        say(f"converting to {options.outtype} ({opened['architecture']}, pre-tokenizer {opened['pre_tokenizer']})")
        request = {"op": "convert", "outfile": str(temporary.resolve()), "outtype": options.outtype}
        child.call(request | {"name": options.name or model.resolve().name}, timeout=CONVERT_TIMEOUT)
    header = read_header(temporary)
    return {"pre_tokenizer": opened["pre_tokenizer"], "types": header.type_counts()}


def _check_values(model: Path, outtype: str) -> None:
    """Every weight finite, and within float16 where it is stored as such (vectors stay float32).

    Raises:
        UserError: Names the tensor, its largest value and what to do.
    """
    entries = [entry for _, entry in tensor_entries(model) if entry.dtype in FLOAT_DTYPES]
    total = sum(entry.stop - entry.start for entry in entries)
    with WeightFolder(model) as weights, byte_progress("checking weights", total) as advance:
        for entry in entries:
            tensor = weights.tensor(entry.name)
            if not is_finite(tensor):
                raise UserError(
                    f"{model}: {entry.name} holds NaN or infinite values. Merge again: uf merge --overwrite."
                )
            if outtype == "f16" and entry.dtype != "F16" and len(entry.shape) > 1:
                largest = max(float(tensor.max()), -float(tensor.min()))
                if largest > FLOAT16_MAX:
                    raise UserError(
                        f"{model}: {entry.name} holds {largest:.4g}, float16 ends at 65504. Use --outtype bf16."
                    )
            advance(entry.stop - entry.start)


def load_template(model: Path) -> ChatTemplate:
    """The chat template that the merged model carries, with all its stop tokens.

    Raises:
        UserError: It has none.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False, local_files_only=True)
    defaults = model / "generation_config.json"
    eos = read_json(defaults).get("eos_token_id") if defaults.is_file() else None
    return ChatTemplate.from_tokenizer(tokenizer, eos_ids=[eos] if isinstance(eos, int) else eos or ())


def _check(temporary: Path, model: Path, output: Path, options: GgufOptions) -> dict[str, Any]:
    say("checking the file: llama.cpp against transformers (float32)")
    probe = ParityProbe(
        folder=model,
        template=load_template(model),
        outtype=options.outtype,
        thinking=options.thinking,
        system=options.system,
        questions=options.questions,
    )
    figures: dict[str, Any] = {"outtype": options.outtype, "token_parity": False}
    try:
        with LlamaCpp(temporary, exact=True) as llama:
            check_parity(llama, probe, figures)
    except UserError as error:
        message = str(error).replace(temporary.name, output.name)
        _record(output, figures | {"passed": False, "error": message})
        raise UserError(message) from None
    say(
        f"same prompts and token ids in {figures['conversations']} conversations x 3 modes and {figures['texts']} "
        f"texts; greedy answers {figures['greedy_equal']}/{figures['greedy_prompts']}; KL "
        f"{figures['kl_p99']:.1e} at the 99th percentile, {figures['kl_max']:.1e} at most"
    )
    return figures


def _record(output: Path, figures: dict[str, Any]) -> None:
    """Put the figures into parity.json, by file name, and renew its line of SHA256SUMS."""
    path = output.parent / PARITY_NAME
    known = json.loads(path.read_text(encoding="utf-8"))["files"] if path.is_file() else {}
    files = {name: entry for name, entry in known.items() if (output.parent / name).is_file()} | {output.name: figures}
    write_json(path, {"token_parity": all(entry["token_parity"] for entry in files.values()), "files": files})
    write_folder_sums(output.parent, [PARITY_NAME])
