"""Add a LoRA adapter to its base and write 16-bit weights, tensor by tensor, on the CPU.

Nothing gets its final name before the stored files were compared with the adapter: the merged model and the base with
its adapter (peft's own forward, float32) answer the same fixed prompt, and their distributions may differ by rounding
only.
"""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import BaseWeights
from unsloth_factory.export.adapter import Adapter
from unsloth_factory.export.base_weights import BaseTensors, default_kind
from unsloth_factory.export.portable import model_card, write_companions
from unsloth_factory.export.progress import byte_progress, say
from unsloth_factory.export.result import ExportResult
from unsloth_factory.export.space import merged_bytes, stored_weights
from unsloth_factory.export.streamed import StreamedModel
from unsloth_factory.export.sums import write_folder_sums
from unsloth_factory.export.validation import validation_loss
from unsloth_factory.export.weights import OutputTensor, WeightFolder, parse_size, plan_shards, write_shards
from unsloth_factory.inference.distributions import kl_divergence
from unsloth_factory.model.fingerprint import check_adapter_base, fingerprint, read_adapter_info
from unsloth_factory.model.finite import is_finite, refuse_nonfinite
from unsloth_factory.model.integrity import refuse_damaged
from unsloth_factory.model.weight_files import read_json, shard_paths
from unsloth_factory.run.atomic import (
    discard,
    exclusive,
    own_partial,
    publish_folder,
    remove_leftovers,
    require_free_space,
    write_json,
)

# Largest KL divergence, in nats, that rounding the merged weights to 16 bits may cost on the fixed prompt.
KL_LIMITS = {torch.float16: 1e-4, torch.bfloat16: 1e-3}
PROBE_TEXT = (
    "请问高血压患者平时需要注意什么? What should a patient with diabetes avoid, and why? "
    "1. 低盐饮食; 2. 按时服药; 3. 12.5 mg twice a day. def dose(x): return x / 2"
)
FIGURES_NAME = "merge.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """How the merged model is stored."""

    dtype: str = "auto"
    """auto (float16 unless a weight overflows it), float16 or bfloat16."""
    max_shard_size: str = "4GB"
    base_weights: BaseWeights = "auto"
    compare_base_weights: bool = False
    overwrite: bool = False
    base_name: str = ""
    """What the user called the base, for messages and the model card."""
    chat_template: str | None = None
    """Jinja text that the run was trained with; written only where it is not the base's own."""
    validation_split: Path | None = None
    """validation_split.jsonl of the run, for `compare_base_weights`."""


class _Overflow(Exception):
    """A merged weight is too large for float16."""

    def __init__(self, name: str, largest: float) -> None:
        super().__init__(f"{name} holds {largest:.4g}, float16 ends at 65504")


def merge(base: Path, adapter_folder: Path, output: Path, options: MergeOptions) -> ExportResult:
    """Merge and publish.

    Args:
        base: Base model folder (16/32-bit safetensors, or bitsandbytes 4-bit).
        adapter_folder: PEFT adapter.
        output: Folder of the merged model; it appears when everything was checked.
        options: See MergeOptions.

    Returns:
        The result; figures: dtype, base_weights, max_abs_logit_diff, kl_max, shards, notes, and with
        `compare_base_weights` the validation losses.

    Raises:
        UserError: Wrong or damaged input, an adapter of another base, too little disk, or a merge that does not
            answer like the adapter.
    """
    started = time.monotonic()
    _refuse_existing(output, options.overwrite)
    max_bytes = parse_size(options.max_shard_size)
    adapter = _checked_adapter(base, adapter_folder, options)
    kinds = _kinds(base, adapter_folder, options)
    _require_space(base, output, len(kinds))
    with exclusive(output.parent, "uf merge"), _temporary_folders(output, kinds) as folders:
        figures = {kind: _merge_one(base, adapter, folders[kind], kind, max_bytes, options) for kind in kinds}
        chosen = _better(folders, figures, options)
        write_json(folders[chosen] / FIGURES_NAME, figures[chosen])
        _write_sums(folders[chosen])
        publish_folder(folders[chosen], output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return ExportResult(output, size, time.monotonic() - started, figures[chosen])


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already. Give --overwrite to replace it, or another --output.")


def _checked_adapter(base: Path, folder: Path, options: MergeOptions) -> Adapter:
    refuse_damaged(base)
    for warning in check_adapter_base(folder, base, fingerprint(base), options.base_name or str(base)):
        say(warning, warn=True)
    return Adapter(folder)


def _kinds(base: Path, adapter_folder: Path, options: MergeOptions) -> list[str]:
    """Which base values are merged into; two when they are to be compared."""
    info = read_adapter_info(adapter_folder)
    quantization = info.quantization if info else None
    default = default_kind(base, quantization)
    if options.base_weights == "as_trained" and default == "original" and quantization is None:
        raise UserError(
            "--base_weights as_trained: this adapter was not trained on quantised weights; its base is the original. "
            "Leave the flag out."
        )
    if options.compare_base_weights:
        if default != "as_trained":
            say("The adapter was trained on the original weights: there is nothing to compare.")
            return [default]
        if options.validation_split is None or not options.validation_split.is_file():
            raise UserError(
                "--compare_base_weights needs the run's validation_split.jsonl; train with --val_split above 0."
            )
        return ["as_trained", "original"]
    return [default if options.base_weights == "auto" else options.base_weights]


def _require_space(base: Path, output: Path, copies: int) -> None:
    require_free_space(output.parent, merged_bytes(stored_weights(base)) * copies, "the merged model")


@contextmanager
def _temporary_folders(output: Path, kinds: list[str]) -> Iterator[dict[str, Path]]:
    names = {kind: output.with_name(f"{output.name}.{kind}" if number else output.name)
             for number, kind in enumerate(kinds)}  # fmt: skip
    folders = {kind: own_partial(path) for kind, path in names.items()}
    try:
        for path in names.values():
            remove_leftovers(path)
        yield folders
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror or error}. Nothing was changed there.") from error
    finally:
        for folder in folders.values():
            discard(folder)


def _merge_one(
    base: Path, adapter: Adapter, folder: Path, kind: str, max_bytes: int, options: MergeOptions
) -> dict[str, Any]:
    """Write one merged model into `folder` and compare it with the adapter; returns its figures."""
    info = read_adapter_info(adapter.folder)
    figures: dict[str, Any] = {"base_weights": kind, "notes": []}
    with BaseTensors(base, kind, info.quantization if info else None) as tensors:
        plan = _output_tensors(tensors, adapter)
        dtype = _write(tensors, adapter, plan, folder, max_bytes, options, figures)
        untied = "lm_head.weight" in {tensor.name for tensor in plan} and "lm_head.weight" not in tensors
        template = options.chat_template if _is_foreign(base, options.chat_template) else None
        write_companions(base, folder, dtype, untied=untied, chat_template=template)
        _compare(tensors, adapter, folder, dtype, figures)
    card = model_card(options.base_name or base.name, {key: value for key, value in figures.items() if key != "notes"})
    (folder / "README.md").write_text(card, encoding="utf-8")
    return figures


def _is_foreign(base: Path, template: str | None) -> bool:
    """Whether the trained template is another than the one that the base's tokenizer carries."""
    if template is None:
        return False
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(base), trust_remote_code=False, local_files_only=True).chat_template
    return template != (own.get("default") if isinstance(own, dict) else own)


def _output_tensors(tensors: BaseTensors, adapter: Adapter) -> list[OutputTensor]:
    """The base's tensors, and an output head of its own where the adapter changes a tied one."""
    names = tensors.names()
    shapes = {name: tensors.shape(name) for name in names}
    for name in sorted(adapter.changed - set(shapes)):
        tied = tensors.tied_source(name)
        if tied is None:
            raise UserError(f"{adapter.folder}: it changes {name}, which the base model does not have.")
        shapes[name] = shapes[tied]
    if "lm_head.weight" not in tensors and tensors.tied_source("lm_head.weight"):
        source = tensors.tied_source("lm_head.weight")
        if source in adapter.changed and "lm_head.weight" not in shapes:
            shapes["lm_head.weight"] = shapes[source]
    for name in adapter.changed:
        found = adapter.shape(name)
        if found != shapes[name]:
            raise UserError(
                f"{adapter.folder}: its change of {name} is {list(found)}, the base has {list(shapes[name])}."
            )
    return [OutputTensor(name, shape) for name, shape in shapes.items()]


def _write(
    tensors: BaseTensors, adapter: Adapter, plan: list[OutputTensor], folder: Path, max_bytes: int,
    options: MergeOptions, figures: dict[str, Any],
) -> torch.dtype:  # fmt: skip
    """Write the shards in the wanted type; with auto, in bfloat16 after a float16 overflow."""
    dtype = DTYPES.get(options.dtype, torch.float16)
    try:
        _write_as(tensors, adapter, plan, folder, max_bytes, dtype)
    except _Overflow as overflow:
        if options.dtype != "auto":
            raise UserError(f"--dtype {options.dtype}: {overflow}. Use --dtype auto or bfloat16.") from None
        figures["notes"].append(f"stored as bfloat16: {overflow}")
        say(f"{overflow}: storing bfloat16.", warn=True)
        dtype = torch.bfloat16
        _write_as(tensors, adapter, plan, folder, max_bytes, dtype)
    figures["dtype"] = str(dtype).removeprefix("torch.")
    return dtype


def _write_as(
    tensors: BaseTensors, adapter: Adapter, plan: list[OutputTensor], folder: Path, max_bytes: int, dtype: torch.dtype
) -> None:
    discard(folder)
    folder.mkdir()
    total = sum(tensor.elements for tensor in plan) * dtype.itemsize
    shards = plan_shards(plan, max_bytes, dtype.itemsize)
    with byte_progress(f"merging ({tensors.kind})", total) as advance:
        for written in write_shards(folder, shards, dtype, lambda name: merged_tensor(tensors, adapter, name, dtype)):
            advance(written)


def merged_tensor(tensors: BaseTensors, adapter: Adapter, name: str, dtype: torch.dtype) -> torch.Tensor:
    """One tensor of the merged model in `dtype`; the sum is made in float32.

    Raises:
        UserError: The base or the merged values are not finite.
        _Overflow: They are, but not in `dtype`.
    """
    value = adapter.replaced.get(name)
    if value is None:
        value = tensors.tensor(name if name in tensors else tensors.tied_source(name) or name)
        if not is_finite(value):
            raise UserError(f"{tensors.folder}: {name} holds NaN or infinite values. Copy or download the base again.")
    factors = adapter.factors(name)
    if factors is not None:
        value = value.float() + factors.delta()
        if not is_finite(value):
            raise UserError(f"{adapter.folder}: {name} is not finite after merging. The training has diverged.")
    stored = value.to(dtype)
    if not is_finite(stored):
        raise _Overflow(name, float(value.float().abs().max()))
    return stored


def _compare(tensors: BaseTensors, adapter: Adapter, folder: Path, dtype: torch.dtype, figures: dict[str, Any]) -> None:
    """Logits of the stored files against those of base and adapter, both computed in float32.

    Raises:
        UserError: They differ by more than rounding can explain.
    """
    ids = probe_ids(folder)
    reference = next(StreamedModel(tensors.folder, tensors.tensor, adapter.folder).logits([ids]))
    gc.collect()
    with WeightFolder(folder) as stored:
        merged = next(StreamedModel(folder, stored.tensor).logits([ids]))
    figures["max_abs_logit_diff"] = float(np.abs(reference - merged).max())
    figures["kl_max"] = float(kl_divergence(reference, merged).max())
    figures["positions"] = len(ids)
    say(
        f"merged against adapter on {len(ids)} positions: max |logit difference| {figures['max_abs_logit_diff']:.2e}, "
        f"max KL {figures['kl_max']:.2e} (limit {KL_LIMITS[dtype]:.0e})"
    )
    if not figures["kl_max"] <= KL_LIMITS[dtype]:
        raise UserError(
            f"The merged model does not answer like the adapter: max KL {figures['kl_max']:.2e}, limit "
            f"{KL_LIMITS[dtype]:.0e} for {figures['dtype']}. Nothing was written. Try --dtype "
            f"{'float16' if dtype == torch.bfloat16 else 'bfloat16'}, or check that base and adapter belong together."
        )


def probe_ids(folder: Path) -> list[int]:
    """Token ids of the fixed prompt in the model's own vocabulary."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    limit = int(read_json(folder / "config.json").get("max_position_embeddings") or 512)
    return tokenizer(PROBE_TEXT, add_special_tokens=False)["input_ids"][: min(256, limit)]


def _better(folders: dict[str, Path], figures: dict[str, dict[str, Any]], options: MergeOptions) -> str:
    """The kind with the lower validation loss; the only one when there is one."""
    if len(folders) == 1:
        return next(iter(folders))
    assert options.validation_split is not None
    losses = {kind: validation_loss(folder, options.validation_split) for kind, folder in folders.items()}
    chosen = min(losses, key=lambda kind: losses[kind])
    for kind, loss in losses.items():
        say(f"validation loss with --base_weights {kind}: {loss:.5f}" + (" (kept)" if kind == chosen else ""))
    figures[chosen]["validation_losses"] = losses
    return chosen


def _write_sums(folder: Path) -> None:
    write_folder_sums(folder, [path.name for path in folder.iterdir() if path.is_file()])


def publish_trained(trained: Path, output: Path, *, overwrite: bool = False) -> ExportResult:
    """A fully trained model has nothing to merge: give its weights, hard-linked, a folder like a merged model's.

    Raises:
        UserError: The output exists, or cannot be written.
    """
    started = time.monotonic()
    _refuse_existing(output, overwrite)
    figures: dict[str, Any] = {"base_weights": "trained", "notes": ["trained in full: nothing to merge"]}
    refuse_damaged(trained)
    refuse_nonfinite(shard_paths(trained))
    with exclusive(output.parent, "uf merge"), _temporary_folders(output, ["trained"]) as folders:
        folder = folders["trained"]
        folder.mkdir()
        for path in sorted(trained.glob("model*.safetensors*")):
            try:
                os.link(path, folder / path.name)
            except OSError:  # another file system
                shutil.copyfile(path, folder / path.name)
        with WeightFolder(trained) as weights:
            dtype = torch.bfloat16 if weights.entry(weights.names()[0]).dtype == "BF16" else torch.float16
        figures["dtype"] = str(dtype).removeprefix("torch.")
        write_companions(trained, folder, dtype, untied=False, chat_template=None)
        write_json(folder / FIGURES_NAME, figures)
        _write_sums(folder)
        publish_folder(folder, output)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return ExportResult(output, size, time.monotonic() - started, figures)
