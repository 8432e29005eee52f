"""`uf validate`: base and tuned model side by side on the validation samples and the domain pack's rules."""

from __future__ import annotations

import json

from rich.console import Console

from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import ResolvedModel, domain_pack, load_source, resolve_source, system_prompt
from unsloth_factory.config.commands import ValidateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.data.load import load_conversations
from unsloth_factory.data.split import read_validation_split
from unsloth_factory.evaluation.answers import Sample, samples_of
from unsloth_factory.evaluation.tables import print_report, print_worst
from unsloth_factory.evaluation.validate import Questions, validate
from unsloth_factory.inference.sampling import Sampling
from unsloth_factory.knowledge import DomainPack, TermNormalizer
from unsloth_factory.run.atomic import write_json, write_text


def run(config: ValidateConfig) -> int:
    """Answer, score, save and print."""
    console = Console()
    resolved = resolve_source(config.source, config.model, quantization_bit=config.quantization_bit)
    pack = domain_pack(resolved, config.data.domain)
    samples = _samples(config, resolved, pack)
    loaded, template = load_source(resolved, console)
    generation = config.generation
    questions = Questions(
        samples=samples,
        template=template,
        thinking=resolved.thinking if generation.think_chain is None else generation.think_chain,
        pack=pack,
        max_new_tokens=generation.max_new_tokens,
        sampling=Sampling(temperature=generation.temperature, top_p=generation.top_p, top_k=generation.top_k),
        batch_size=config.batch_size,
    )
    with counting(console, "answers") as progress:
        description = resolved.description(loaded)
        result = validate(loaded, questions, resolved.variants, model=description, on_progress=progress)
    folder = resolved.results("validation_results", config.save_dir)
    print_report(result.report, console)
    print_worst(result.report, console)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result.records]
    for path in (
        write_json(folder / "validation.json", result.report.to_dict()),
        write_text(folder / "samples.jsonl", "".join(lines)),
    ):
        console.print(f"saved {path}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _samples(config: ValidateConfig, resolved: ResolvedModel, pack: DomainPack | None) -> list[Sample]:
    """The given dataset, or what the run held out."""
    if config.data.dataset:
        normalizer = TermNormalizer(pack) if pack else None
        conversations, _ = load_conversations(config.data, normalizer=normalizer)
    elif resolved.folder:
        conversations = read_validation_split(resolved.folder.validation_split)
    else:
        raise UsageError("Validate on what? Give --dataset, or --run of a training that held samples out.")
    return samples_of(conversations, system_prompt(resolved, config.data.system, config.data.domain))[
        : config.max_samples
    ]
