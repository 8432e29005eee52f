"""`uf quality`: perplexity and KL divergence of each GGUF file on held-out answers, and the gate of `uf quantize`."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.gguf_files import gguf_paths, gguf_variants, shortest_context
from unsloth_factory.commands.picked import write_pick
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.source import (
    ResolvedModel,
    domain_pack,
    gguf_template,
    require_same_tokenizer,
    resolve_source,
    system_prompt,
)
from unsloth_factory.config.commands import QualityConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, GateSettings
from unsloth_factory.data.load import load_conversations
from unsloth_factory.data.split import read_validation_split
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenSample
from unsloth_factory.evaluation.quality.gate import FileQuality, judge, pick, quality_values
from unsloth_factory.evaluation.quality.kept import KeptQuality
from unsloth_factory.evaluation.quality.pages import QualityReport, html_page, markdown_page, quality_table
from unsloth_factory.evaluation.quality.token_scores import (
    TokenScores,
    answer_samples,
    reference_bytes,
    score_file,
    score_reference,
)
from unsloth_factory.export.quantize import SOURCE_TYPES
from unsloth_factory.export.sums import verify_file
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp, require_library
from unsloth_factory.knowledge import TermNormalizer
from unsloth_factory.run.atomic import require_free_space, write_json, write_text


@dataclass(frozen=True)
class HeldOut:
    """What the files are measured on, encoded as training encodes it."""

    resolved: ResolvedModel
    template: ChatTemplate
    samples: list[TokenSample]
    """All of them; those that fit are chosen when the files are known."""
    source: str


def run(config: QualityConfig) -> int:
    """Measure the files, save and print, and pick one when there is a gate."""
    console = Console()
    resolved = resolve_source(config.source, config.model)
    paths = gguf_paths(config.gguf, resolved)
    held_out = read_held_out(resolved, config.data)
    target = resolved.results("quality_results", config.save_dir)
    return measure_and_judge(paths, held_out, config.quality, target, console)


def read_held_out(resolved: ResolvedModel, data: DataSettings) -> HeldOut:
    """The given dataset, or what the run held out.

    Raises:
        UsageError: There is neither.
        UserError: The data cannot be read.
    """
    conversations: Sequence[Conversation]
    if data.dataset:
        pack = domain_pack(resolved, data.domain)
        normalizer = TermNormalizer(pack) if pack else None
        system = system_prompt(resolved, data.system, data.domain)
        conversations, _ = load_conversations(data, system=system, normalizer=normalizer)
        source = data.dataset
    elif resolved.folder:
        conversations = read_validation_split(resolved.folder.validation_split)
        source = str(resolved.folder.validation_split)
    else:
        raise UsageError("Measure on what? Give --dataset, or --run of a training that held samples out.")
    template = gguf_template(resolved)
    rows = template.encode_conversations(conversations)
    return HeldOut(resolved, template, [sample for row in rows for sample in row], source)


def measure_and_judge(
    paths: Sequence[Path], held_out: HeldOut, gate: GateSettings, target: Path, console: Console
) -> int:
    """Measure each file against the 16-bit one among them; with a gate pick the smallest that passes.

    Raises:
        UserError: There is no 16-bit file or nothing to compare with it; or no file passed the gate. The reports are
            written all the same.
    """
    require_library("cyllama", "measuring a GGUF file")
    files = gguf_variants(paths)
    headers = {name: read_header(path) for name, path in files.items()}
    whole = [name for name, header in headers.items() if set(header.type_counts()) <= SOURCE_TYPES]
    if not whole or len(files) < 2:
        raise UserError(
            f"{', '.join(path.name for path in files.values())}: a 16-bit file (f16, bf16 or f32) and at least one "
            "other are needed. Make them: uf gguf, uf quantize."
        )
    reference = max(whole, key=lambda name: files[name].stat().st_size)
    digests = {name: verify_file(path) for name, path in files.items()}
    samples = answer_samples(held_out.samples, shortest_context(list(headers.values())), gate.gate_tokens)
    engine = f"llama.cpp (cyllama {version('cyllama')})"
    kept = KeptQuality(target / "measured", digests[reference], engine, samples)
    ordered = {name: files[name] for name in (reference, *(name for name in files if name != reference))}
    scores = _measure(ordered, digests, samples, held_out, kept, target, console)
    qualities = []
    for name, path in sorted(ordered.items(), key=lambda item: -item[1].stat().st_size):
        values, losses = quality_values(scores[reference], scores[name])
        losses = {} if name == reference else losses
        qualities.append(FileQuality(name, str(path), digests[name], path.stat().st_size, values, losses))
    report = QualityReport(
        model=str(held_out.resolved.settings.model),
        engine=engine,
        source=held_out.source,
        answers=len(samples),
        tokens=len(scores[reference].loss),
        reference=reference,
        files=tuple(qualities),
    )
    return _conclude(report, gate, held_out.resolved, target, console)


def _measure(
    files: Mapping[str, Path],
    digests: Mapping[str, str],
    samples: Sequence[TokenSample],
    held_out: HeldOut,
    kept: KeptQuality,
    target: Path,
    console: Console,
) -> dict[str, TokenScores]:
    """Scores of each file, the 16-bit one first; one file is open at a time, and its distributions lie on the disk."""
    found = {name: kept.read(digests[name]) for name in files}
    known = {name: scores for name, scores in found.items() if scores is not None}
    if len(known) == len(files):
        console.print(f"all files were measured before: {target / 'measured'}", style="dim", soft_wrap=True)
        return known
    reference = next(iter(files))
    target.mkdir(parents=True, exist_ok=True)
    check = partial(require_same_tokenizer, template=held_out.template, resolved=held_out.resolved)
    vocabulary = 0
    with tempfile.TemporaryFile(dir=target) as store:
        for name, path in files.items():
            if name in known and name != reference:
                continue
            with LlamaCpp(path, exact=True) as llama, counting(console, f"{name}: answers") as progress:
                check(llama)
                if name == reference:
                    vocabulary = llama.vocab_size
                    require_free_space(target, reference_bytes(samples, vocabulary), "the 16-bit file's distributions")
                    known[name] = score_reference(llama, samples, store, progress)
                else:
                    known[name] = score_file(llama, samples, store, vocabulary, progress)
            kept.write(digests[name], known[name])
    return known


def _conclude(
    report: QualityReport, gate: GateSettings, resolved: ResolvedModel, target: Path, console: Console
) -> int:
    """Judge, save, print, and record the pick."""
    picked = None
    if gate.gate is not None:
        judged = judge(report.files, gate.gate_measure, gate.gate)
        picked = pick(judged)
        name = picked.name if picked else None
        report = replace(report, files=tuple(judged), gate=gate.gate, measure=gate.gate_measure, picked=name)
        if resolved.folder:
            write_pick(resolved.folder, gate, picked)
    console.print(f"{report.tokens:,} tokens of {report.answers:,} held-out answers, ± standard error; {report.source}",
                  highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    console.print(quality_table(report))
    write_json(target / "quality.json", report.to_dict())
    write_text(target / "quality.html", html_page(report))
    write_text(target / "quality.md", markdown_page(report))
    console.print(f"saved {target / 'quality.json'}, quality.html, quality.md", highlight=False, markup=False,
                  soft_wrap=True)  # fmt: skip
    if gate.gate is None:
        return 0
    if picked is None:
        raise UserError(_none_passed(report, gate, resolved))
    served = " uf deploy takes it." if resolved.folder else ""
    line = f"picked {picked.path}: the smallest with a {report.gate_words}.{served}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _none_passed(report: QualityReport, gate: GateSettings, resolved: ResolvedModel) -> str:
    losses = [(file.losses[gate.gate_measure], file.name) for file in report.files if file.losses]
    best, name = min(losses, key=lambda item: item[0].upper)
    chance = ""
    if best.value <= float(gate.gate or 0):
        chance = " Its value is below the limit, but so few answers cannot show it: hold more out (--val_split)."
    return (
        f"No file has a {report.gate_words}. The best is {name} with {best.value:.3g}, up to {best.upper:.3g}."
        f"{chance} All files are kept, and so is the report. Use a type with more bits (--types q6_k,q8_0), serve "
        f"the {report.reference} file (uf deploy --gguf), or allow more (--gate)."
    )
