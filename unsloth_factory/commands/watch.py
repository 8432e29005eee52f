"""What `uf sft` and `uf dpo` look at beside the held-out loss: general questions, and answers to held-out ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unsloth_factory.config.commands import SftConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.settings import DataSettings, WatchSettings
from unsloth_factory.data.encode import encode_samples
from unsloth_factory.data.load import load_conversations
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenSample
from unsloth_factory.evaluation.validation.sample_answers import SampleAnswers
from unsloth_factory.knowledge import DomainPack
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.watch.forgetting import split_general

GENERAL = Path(__file__).resolve().parent.parent / "assets" / "general.jsonl"


@dataclass(frozen=True)
class Watched:
    """What is handed to the training for it."""

    general_items: Sequence[TokenSample]
    replay_items: Sequence[TokenSample]
    answerer: SampleAnswers | None


def check_watch(config: SftConfig, command: str) -> None:
    """Refuse what this method or this data cannot give.

    Raises:
        UsageError: Names the flag and the way out.
    """
    watch = config.watch
    metric = watch.metric_for_best
    if metric.startswith("rewards/") and command != "dpo":
        raise UsageError(f"--metric_for_best {metric}: only dpo has rewards; take loss or exact_match")
    if metric in ("term_coverage", "association_coverage") and config.data.domain is None:
        raise UsageError(f"--metric_for_best {metric}: needs a domain pack; give --domain")
    if watch.forgetting == "replay" and command != "sft":
        raise UsageError(
            f"--forgetting replay: {command} trains on pairs, and general questions are none. Use --forgetting stop, "
            "or a higher --beta, which holds the model closer to where it began."
        )


def general_conversations(watch: WatchSettings, held_out: Sequence[object]) -> list[Conversation]:
    """The general questions; none where they would not be looked at.

    Raises:
        UserError: --general_dataset cannot be read.
        UsageError: It has too few rows, or something is asked of an evaluation that will not take place.
    """
    if not held_out:
        _require_held_out(watch)
    if watch.forgetting == "off" or (watch.forgetting == "warn" and not held_out):
        return []
    source = watch.general_dataset or str(GENERAL)
    conversations, _ = load_conversations(DataSettings(dataset=source))
    if len(conversations) < 2:
        raise UsageError(f"--general_dataset {source}: needs two rows or more, one to measure and one to replay")
    return conversations


def _require_held_out(watch: WatchSettings) -> None:
    given = {
        "early_stopping_patience": watch.early_stopping_patience is not None,
        "load_best": bool(watch.load_best),
        "metric_for_best": watch.metric_for_best != "loss",
        "sample_generations": bool(watch.sample_generations),
    }
    wanted = [f"--{flag}" for flag, is_given in given.items() if is_given]
    if wanted:
        raise UsageError(
            f"{', '.join(wanted)}: no sample is held out, so nothing is evaluated. Give --val_split or --eval_dataset."
        )


def watched(
    config: SftConfig,
    general: Sequence[Conversation],
    held_out: Sequence[Conversation],
    *,
    loaded: LoadedModel,
    template: ChatTemplate,
    thinking: bool | None,
    pack: DomainPack | None,
) -> Watched:
    """Token rows of the general questions, and what answers the held-out ones."""
    length = config.data.max_seq_length
    rows = encode_samples(general, template, length) if general else []
    measured, replay = split_general(rows)
    answers = SampleAnswers(
        loaded,
        template,
        held_out,
        count=config.watch.answers,
        thinking=thinking,
        pack=pack,
        max_new_tokens=config.watch.sample_max_new_tokens,
        longest_prompt=length,
    )
    return Watched(measured, replay, answers if len(answers) else None)
