"""`uf sft` and `uf dpo`: settings -> data -> model -> training, top to bottom."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from unsloth_factory.commands.watch import check_watch, general_conversations, watched
from unsloth_factory.config.commands import DpoConfig, SftConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings
from unsloth_factory.data.encode import encode_pairs, encode_samples
from unsloth_factory.data.load import load_conversations, load_pairs
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.thinking import thinking_mode
from unsloth_factory.data.training_data import training_data
from unsloth_factory.data.types import Conversation, DataReport, PreferencePair, TokenPair, TokenSample
from unsloth_factory.knowledge import DomainPack, PackError, TermNormalizer, load_pack
from unsloth_factory.model.device import default_quantization, pick_device_dtype
from unsloth_factory.model.environment import versions
from unsloth_factory.model.load import load_model
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.run.atomic import write_json
from unsloth_factory.run.folder import RunFolder, RunManifest, Thinking
from unsloth_factory.training.checkpoints.store import CheckpointStore, claim
from unsloth_factory.training.job import TrainingJob, TrainResult
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import METHODS, Method
from unsloth_factory.training.pacing.time_budget import process_started
from unsloth_factory.training.reporting.progress import print_labelled


@dataclass(frozen=True)
class Prepared:
    """Both sides of the split, as conversations (or pairs) and as token rows."""

    train_items: Sequence[TokenSample] | Sequence[TokenPair]
    eval_items: Sequence[TokenSample] | Sequence[TokenPair]
    held_out: list[Conversation]
    thinking: Thinking
    report: DataReport


def run_sft(config: SftConfig, started: float | None = None) -> int:
    """`uf sft`; its --time_budget began with the process, or at `started` on the clock of `time.monotonic`."""
    sft(config, process_started() if started is None else started)
    return 0


def run_dpo(config: DpoConfig, started: float | None = None) -> int:
    """`uf dpo`; its --time_budget began with the process, or at `started` on the clock of `time.monotonic`."""
    dpo(config, process_started() if started is None else started)
    return 0


def sft(config: SftConfig, started: float | None = None) -> TrainResult:
    """Supervised fine-tuning; for notebooks too. A time budget begins now, or at `started` (`time.monotonic`)."""
    return _train(config, "sft", METHODS["sft"](), time.monotonic() if started is None else started)


def dpo(config: DpoConfig, started: float | None = None) -> TrainResult:
    """Direct preference optimisation; for notebooks too. A time budget begins now, or at `started`."""
    return _train(config, "dpo", METHODS["dpo"](beta=config.beta), time.monotonic() if started is None else started)


def _train(config: SftConfig, command: str, method: Method, started: float) -> TrainResult:
    if config.model.model is None or config.data.dataset is None:
        missing = [f"--{name}" for name, value in _required(config).items() if value is None]
        raise UsageError(
            f"uf {command} needs {' and '.join(missing)}. Example: uf {command} --model tiny --dataset d.csv"
        )
    check_watch(config, command)
    console = _console()
    folder = RunFolder(Path(config.run.output_dir or f"output/{command}-{datetime.now():%Y%m%d-%H%M%S}"))
    pack = _domain_pack(config.data.domain)
    with claim(folder, config.run, lambda line: console.print(line, highlight=False, markup=False)) as store:
        items, held_out, report = _load_items(config, command, pack)
        general = general_conversations(config.watch, held_out)
        loaded = _load(config, command, store)
        eos = loaded.generation_defaults.get("eos_token_id", [])
        template = ChatTemplate.from_tokenizer(
            loaded.tokenizer, config.model.chat_template, eos_ids=[eos] if isinstance(eos, int) else eos
        )
        prepared = _encode(config, template, items, held_out, report)
        write_json(folder.data_report, asdict(report))
        _print_report(console, report, folder)
        manifest = _manifest(config, command, loaded, template, pack, prepared.thinking)
        looked_at = watched(
            config,
            general,
            prepared.held_out,
            loaded=loaded,
            template=template,
            thinking=manifest.thinking_flag,
            pack=pack,
        )
        job = TrainingJob(
            loaded=loaded,
            template=template,
            method=method,
            train_items=prepared.train_items,
            eval_items=prepared.eval_items,
            held_out=prepared.held_out,
            general_items=looked_at.general_items,
            replay_items=looked_at.replay_items,
            answerer=looked_at.answerer,
            tuning=config.tuning,
            loop=config.loop,
            run=config.run,
            watch=config.watch,
            guard=config.guard,
            folder=folder,
            manifest=manifest,
            store=store,
            started=started,
            resume_command=_resume_command(command, folder),
            console=console,
        )
        result = train(job)
    console.print(
        f"Trained {result.steps} steps in {result.seconds:.0f} s. Weights: {result.adapter_path}\n"
        f"Next: uf validate --run {shlex.quote(str(folder.path))}",
        highlight=False,
        soft_wrap=True,
    )
    return result


def _console() -> Console:
    """In a notebook one stream of plain text: rich would make an HTML output of every line."""
    console = Console()
    return Console(force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def _required(config: SftConfig) -> dict[str, str | None]:
    return {"model": config.model.model, "dataset": config.data.dataset}


def _domain_pack(domain: str | None) -> DomainPack | None:
    try:
        return load_pack(domain) if domain else None
    except PackError as error:
        raise UsageError(f"--domain {domain}: {error}") from error


def _load_items(config: SftConfig, command: str, pack: DomainPack | None) -> tuple[list[Any], list[Any], DataReport]:
    """(training items, held-out items, report), before tokens."""
    load: Any = load_pairs if command == "dpo" else load_conversations
    system = config.data.system or (pack.system_prompt if pack else None)
    normalizer = TermNormalizer(pack) if pack else None
    return training_data(config.data, load, seed=config.loop.seed, system=system, normalizer=normalizer)


def _load(config: SftConfig, command: str, store: CheckpointStore) -> LoadedModel:
    """The model; --engine auto goes on with the engine that the run began with, and the fast one begins SFT alone."""
    device, _, _ = pick_device_dtype(config.tuning.dtype)
    begun = store.newest_engine() if config.run.resume else None
    return load_model(
        config.model,
        quantization_bit=default_quantization(config.tuning, device),
        for_training=True,
        tuning=config.tuning,
        seed=config.loop.seed,
        prefers=begun or ("fast" if command == "sft" else "standard"),
    )


def _encode(
    config: SftConfig, template: ChatTemplate, items: list[Any], held_out: list[Any], report: DataReport
) -> Prepared:
    length, policy = config.data.max_seq_length, config.data.long_samples
    encode: Any = encode_pairs if isinstance(items[0], PreferencePair) else encode_samples
    conversations = [_conversation(item) for item in held_out]
    return Prepared(
        train_items=encode(items, template, length, policy, report),
        eval_items=_encode_held_out(encode, held_out, template, config.data, report),
        held_out=conversations,
        thinking=_thinking(items, template),
        report=report,
    )


def _encode_held_out(
    encode: Any, held_out: list[Any], template: ChatTemplate, data: DataSettings, report: DataReport
) -> list[Any]:
    """Token rows of the held-out items; that all of them are too long must not end the training."""
    if not held_out:
        return []
    own = DataReport()
    try:
        return encode(held_out, template, data.max_seq_length, data.long_samples, own)
    except UserError as error:
        report.notes[f"held-out samples without an evaluation loss: {error}"] = len(held_out)
        return []
    finally:
        for what, count in (("shortened", own.shortened), ("dropped, too long", own.dropped_too_long)):
            if count:
                report.notes[f"of the held-out samples {what}"] = count


def _conversation(item: Conversation | PreferencePair) -> Conversation:
    return item if isinstance(item, Conversation) else Conversation((*item.prompt, item.chosen), item.source)


def _thinking(items: Sequence[Any], template: ChatTemplate) -> Thinking:
    """The mode that later commands prompt with; "unset" where the template has no such switch."""
    if not template.supports_thinking:
        return "unset"
    return thinking_mode([_conversation(item) for item in items])


def _manifest(
    config: SftConfig,
    command: str,
    loaded: LoadedModel,
    template: ChatTemplate,
    pack: DomainPack | None,
    thinking: Thinking,
) -> RunManifest:
    return RunManifest(
        command=command,
        model=str(config.model.model),
        base_fingerprint=loaded.fingerprint,
        finetuning_type=config.tuning.finetuning_type,
        quantization_bit=4 if loaded.quantized else None,
        thinking=thinking,
        domain=config.data.domain,
        system=config.data.system or (pack.system_prompt if pack else None),
        max_seq_length=config.data.max_seq_length,
        chat_template_sha256=template.sha256,
        seed=config.loop.seed,
        config=asdict(config),
        versions=versions(),
    )


def _print_report(console: Console, report: DataReport, folder: RunFolder) -> None:
    """What became of the rows, in a few lines."""
    for file in report.files:
        kind = ", ".join(filter(None, (file["format"], file["encoding"])))
        print_labelled(console, f"Data        {file['path']}: {file['rows']:,} rows, {kind}")
    losses = [f"{count:,} {reason}" for reason, count in report.skipped.items()]
    losses += [f"{report.shortened:,} prompts shortened"] if report.shortened else []
    losses += [f"{report.dropped_too_long:,} dropped, too long"] if report.dropped_too_long else []
    losses += [f"{report.terms_normalized:,} terms brought to one form"] if report.terms_normalized else []
    losses += [f"{count:,} {what}" for what, count in report.notes.items()]
    if losses:
        print_labelled(console, f"            {'; '.join(losses)} ({folder.data_report})")
    for line in (*report.skipped_examples[:2], *report.leaks[:2]):
        print_labelled(console, f"            such as {line}")
    tokens = report.tokens
    print_labelled(
        console,
        f"Tokens      {tokens['total']:,.0f}, {tokens['trained']:,.0f} of them trained; a sample has "
        f"{tokens['mean']:.0f} on average, {tokens['max']:.0f} at most",
    )


def _resume_command(command: str, folder: RunFolder) -> str:
    """The command line that continues this run; for a caller of `sft()` or `dpo()`, what to change in the call."""
    if sys.argv[1:2] == ["run"]:
        return "uf " + shlex.join(sys.argv[1:])
    if sys.argv[1:2] != [command]:
        return f"the same call with resume='auto', output_dir={str(folder.path)!r}"
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    if "--resume" not in words:
        words += ["--resume", "auto"]
    if not any(word.startswith(("--output_dir", "--output-dir")) for word in words):
        words += ["--output_dir", str(folder.path)]
    return "uf " + shlex.join(words)
