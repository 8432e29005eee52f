"""`uf validate`: base and tuned model side by side on the validation samples and the domain pack's rules."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.endpoint import remote_model, resolve_asked, validate_endpoint
from unsloth_factory.commands.gguf_files import described_files, gguf_paths, gguf_variants, shortest_context
from unsloth_factory.commands.judge import follow_up, kept_answers, wanted
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import (
    ResolvedModel,
    domain_pack,
    gguf_template,
    load_source,
    require_same_tokenizer,
    system_prompt,
)
from unsloth_factory.config.commands import ValidateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.data.load import load_conversations
from unsloth_factory.data.split import read_validation_split
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.judge.cases import AnswerFiles
from unsloth_factory.evaluation.pages import html_page, markdown_page
from unsloth_factory.evaluation.tables import print_report, print_worst
from unsloth_factory.evaluation.validation.answers import Sample, samples_of
from unsloth_factory.evaluation.validation.references import model_losses
from unsloth_factory.evaluation.validation.validate import (
    Questions,
    ValidationResult,
    gguf_answerer,
    model_answerers,
    validate,
)
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.knowledge import DomainPack, TermNormalizer
from unsloth_factory.run.atomic import write_json, write_text
from unsloth_factory.scoring.bertscore import BertScorer
from unsloth_factory.scoring.text import INSTALL_HINT


def run(config: ValidateConfig) -> int:
    """Answer, score, save and print; what comes after the answers takes those that are there."""
    console = Console()
    kept = kept_answers(config)
    if not (wanted(config) and kept.there):
        _answer(config, kept, console)
    return follow_up(config, kept, console)


def _answer(config: ValidateConfig, kept: AnswerFiles, console: Console) -> None:
    _similarity(config)  # before the weights are loaded: a misspelt folder must not cost a minute
    resolved = resolve_asked(config.source, config.model, config.remote, quantization_bit=config.quantization_bit)
    pack = domain_pack(resolved, config.data.domain)
    samples = _samples(config, resolved, pack)
    if config.gguf:
        result = _files(config, resolved, partial(_questions, config, resolved, samples, pack), console)
    elif config.remote.endpoint:
        remote = remote_model(config.remote, _thinking(config, resolved))
        result = validate_endpoint(remote, _questions(config, resolved, samples, pack, remote.template), console)
    else:
        loaded, template = load_source(resolved, console)
        with counting(console, "answers") as progress:
            result = validate(
                model_answerers(loaded, resolved.variants),
                _questions(config, resolved, samples, pack, template, loaded.device.type),
                max_positions=loaded.max_positions,
                losses=model_losses(loaded, template, resolved.variants, _batch_size(config, loaded.device.type)),
                model=resolved.description(loaded),
                on_progress=progress,
            )
    print_report(result.report, console)
    print_worst(result.report, console)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result.records]
    write_json(kept.report, result.report.to_dict())
    write_text(kept.samples, "".join(lines))
    pages = [f"{kept.report.stem}.{kind}" for kind in ("html", "md")]
    write_text(kept.folder / pages[0], html_page(result.report))
    write_text(kept.folder / pages[1], markdown_page(result.report))
    console.print(
        f"saved {kept.report}, {kept.samples.name}, {', '.join(pages)}", highlight=False, markup=False, soft_wrap=True
    )


def _thinking(config: ValidateConfig, resolved: ResolvedModel) -> bool | None:
    chosen = config.generation.think_chain
    return resolved.thinking if chosen is None else chosen


def _questions(
    config: ValidateConfig,
    resolved: ResolvedModel,
    samples: list[Sample],
    pack: DomainPack | None,
    template: ChatTemplate,
    device: str = "cpu",
) -> Questions:
    generation = config.generation
    return Questions(
        samples=samples,
        template=template,
        thinking=_thinking(config, resolved),
        pack=pack,
        max_new_tokens=generation.max_new_tokens,
        sampling=Sampling(temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k),
        batch_size=_batch_size(config, device),
        similarity=_similarity(config),
    )


def _batch_size(config: ValidateConfig, device: str) -> int:
    """On a CPU more answers at once only cost memory that is there: 200 took 56 s by 32 and 76 s by 8."""
    return config.batch_size or (8 if device == "cuda" else 32)


def _similarity(config: ValidateConfig) -> BertScorer | None:
    """What --bertscore asks for.

    Raises:
        UsageError: It is not installed, or the folder holds no encoder with such a layer.
    """
    if config.bertscore is None:
        return None
    folder = Path(config.bertscore).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"--bertscore {config.bertscore} is no folder. Give that of an encoder, nothing is downloaded."
        )
    try:
        return BertScorer(folder, config.bertscore_layer)
    except ImportError as error:
        raise UsageError(f"--bertscore: {error}. {INSTALL_HINT}") from error
    except ValueError as error:
        raise UsageError(f"--bertscore {config.bertscore}: {error}") from error


def _files(config: ValidateConfig, resolved: ResolvedModel, questions_of: Any, console: Console) -> ValidationResult:
    """Each GGUF file is a variant, named by its type."""
    template = gguf_template(resolved)
    variants = gguf_variants(gguf_paths(str(config.gguf), resolved))
    headers = [read_header(path) for path in variants.values()]
    known = described_files(variants)
    check = partial(require_same_tokenizer, template=template, resolved=resolved)
    with counting(console, "answers") as progress:
        return validate(
            {variant: gguf_answerer(path, check) for variant, path in variants.items()},
            questions_of(template),
            max_positions=shortest_context(headers),
            model={"model": resolved.settings.model, "engine": "llama.cpp", "gguf": known},
            on_progress=progress,
        )


def _samples(config: ValidateConfig, resolved: ResolvedModel, pack: DomainPack | None) -> list[Sample]:
    """The given dataset, or what the run held out."""
    if config.data.dataset:
        normalizer = TermNormalizer(pack) if pack else None
        conversations, _ = load_conversations(config.data, normalizer=normalizer)
    elif resolved.folder:
        conversations = read_validation_split(resolved.folder.validation_split)
    else:
        raise UsageError("Validate on what? Give --dataset, or --run of a training that held samples out.")
    system = system_prompt(resolved, config.data.system, config.data.domain)
    return samples_of(conversations, system)[: config.max_samples]
