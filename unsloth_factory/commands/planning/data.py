"""The samples that `uf plan` plans with: those of the dataset by their lengths, or an assumption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from unsloth_factory.config.commands import PlanConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.estimate.workload import Sample, Workload, assumed_workload
from unsloth_factory.model.shapes import has_tokenizer
from unsloth_factory.training.memory.cuts import merged


def workload_of(config: PlanConfig, model: Path) -> Workload:
    """Lengths of the dataset's samples; without a dataset, samples of --max_seq_length.

    Args:
        config: Settings.
        model: The model's config.json; its tokenizer lies beside it.

    Raises:
        UserError: The data cannot be used, or there is no tokenizer for it.
    """
    loop, packing = config.loop, not config.loop.no_packing
    if config.data.dataset is None:
        rows = 2 if config.method == "dpo" else 1
        return assumed_workload(config.data.max_seq_length, rows, packing, loop.epochs, loop.max_steps, merged)
    if not has_tokenizer(model.parent):
        raise UserError(
            f"--dataset {config.data.dataset} needs the model's tokenizer, and {model.parent} has none. Copy "
            "tokenizer.json there, or leave --dataset out: samples of --max_seq_length are then assumed."
        )
    order = partial(_step_order, epochs=loop.epochs, max_steps=loop.max_steps, seed=loop.seed)
    return Workload(tuple(_samples(config, model.parent)), order, packing, merge=merged)


def _step_order(
    samples: int, batch_size: int, accumulation_steps: int, *, epochs: float, max_steps: int | None, seed: int
) -> Iterable[list[list[int]]]:
    """The order of the training itself."""
    from unsloth_factory.data.batching import StepPlan

    plan = StepPlan(samples, batch_size, accumulation_steps, epochs, max_steps, seed)
    return map(plan.step, range(plan.total_steps))


def _samples(config: PlanConfig, folder: Path) -> Sequence[Sample]:
    """The training samples as `uf sft` and `uf dpo` encode them, by their lengths."""
    from unsloth_factory.data.encode import encode_pairs, encode_samples
    from unsloth_factory.data.load import load_conversations, load_pairs
    from unsloth_factory.data.template import ChatTemplate
    from unsloth_factory.data.training_data import training_data
    from unsloth_factory.data.types import TokenPair
    from unsloth_factory.knowledge import PackError, TermNormalizer, load_pack
    from unsloth_factory.model.standard import load_tokenizer

    try:
        pack = load_pack(config.data.domain) if config.data.domain else None
    except PackError as error:
        raise UsageError(f"--domain {config.data.domain}: {error}") from error
    load: Any = load_pairs if config.method == "dpo" else load_conversations
    encode: Any = encode_pairs if config.method == "dpo" else encode_samples
    items: Any
    items, _, report = training_data(
        config.data,
        load,
        seed=config.loop.seed,
        system=config.data.system or (pack.system_prompt if pack else None),
        normalizer=TermNormalizer(pack) if pack else None,
    )
    template = ChatTemplate.from_tokenizer(load_tokenizer(folder), config.model.chat_template)
    rows = encode(items, template, config.data.max_seq_length, config.data.long_samples, report)
    return [_sample((row.chosen, row.rejected) if isinstance(row, TokenPair) else (row,)) for row in rows]


def _sample(rows: Sequence[Any]) -> Sample:
    # the first token of a row is predicted by nothing
    return Sample(tuple(len(row.ids) for row in rows), sum(int(row.trained[1:].sum()) for row in rows))
