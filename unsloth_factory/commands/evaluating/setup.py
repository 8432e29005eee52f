"""What the settings say of a benchmark whose choices are scored."""

from __future__ import annotations

from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.choice.benchmark import Benchmark
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions


def scored_setup(
    config: EvaluateConfig, benchmark: Benchmark, split: str, template: ChatTemplate, positions: int
) -> tuple[PromptMaker, ChoiceOptions]:
    """How questions are asked, and which: the same for every engine, so that their scores compare."""
    maker = PromptMaker(
        benchmark=benchmark,
        tokenizer=template.tokenizer,
        template=None if config.no_chat_template else template,
        lang=config.lang or next(iter(benchmark.prompts)),
        thinking=bool(config.think_chain),
        mode="letter" if config.choice_mode == "letter" else "text",
    )
    options = ChoiceOptions(
        n_shot=config.shots,
        split=split,
        subjects=config.subjects,
        per_character=config.choice_mode == "text_normalized",
        max_tokens=positions,
    )
    return maker, options
