"""What `uf validate` does with answers that are there: a model judges them, or people do."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from rich.console import Console

from unsloth_factory.commands.endpoint import resolve_asked
from unsloth_factory.commands.progress import counting
from unsloth_factory.commands.review import read_back, write_sheet
from unsloth_factory.commands.source import ResolvedModel, load_source
from unsloth_factory.config.commands import ValidateConfig
from unsloth_factory.config.errors import UsageError
from unsloth_factory.config.judging import JudgeSettings
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.evaluation.judge.asking import Estimate, Judge
from unsloth_factory.evaluation.judge.cache import ReplyCache
from unsloth_factory.evaluation.judge.cases import AnswerFiles, with_others
from unsloth_factory.evaluation.judge.judges import EndpointJudge, LoadedJudge
from unsloth_factory.evaluation.judge.judging import judge_answers
from unsloth_factory.evaluation.judge.page import judge_page
from unsloth_factory.evaluation.judge.printing import print_judgement
from unsloth_factory.evaluation.validation.review import ReviewKey
from unsloth_factory.inference.endpoint import Endpoint
from unsloth_factory.run.atomic import write_json, write_text


def kept_answers(config: ValidateConfig) -> AnswerFiles:
    """Where the validation's answers lie or will lie."""
    if config.gguf and config.remote.endpoint:
        raise UsageError("--gguf and --endpoint: one of the two answers; give them one after the other.")
    kind = "gguf" if config.gguf else "endpoint" if config.remote.endpoint else ""
    if config.save_dir:
        kept = AnswerFiles(Path(config.save_dir).expanduser(), kind)
    else:
        resolved = resolve_asked(config.source, config.model, config.remote, quantization_bit=config.quantization_bit)
        kept = AnswerFiles(resolved.results("validation_results", None), kind)
    if config.reviewing.ratings:
        ReviewKey.read(kept.named("review_key.json"))  # before any answer is generated
    return kept


def wanted(config: ValidateConfig) -> bool:
    """Whether anything is to be done with answers that are there."""
    return bool(config.judging.judge or config.reviewing.review or config.reviewing.ratings)


def follow_up(config: ValidateConfig, kept: AnswerFiles, console: Console) -> int:
    """What was asked for beyond the answers themselves."""
    if wanted(config):
        _say_which(kept, console)
    if config.judging.judge:
        _judge(config, kept, console)
    if config.reviewing.review:
        write_sheet(kept, config.reviewing.review_seed, config.max_samples, console)
    if config.reviewing.ratings:
        read_back(kept, config.reviewing.ratings, console)
    return 0


def _say_which(kept: AnswerFiles, console: Console) -> None:
    """Name the answers that are taken, so that older ones are not taken for new."""
    made = datetime.fromtimestamp(kept.samples.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    line = (
        f"answers of {made}: {kept.samples} (the same command without --judge, --review and --ratings makes new ones)"
    )
    console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _judge(config: ValidateConfig, kept: AnswerFiles, console: Console) -> None:
    settings = config.judging
    cases = kept.cases(config.max_samples)
    if settings.judge_against:
        others = [Path(part.strip()).expanduser() for part in settings.judge_against.split(",") if part.strip()]
        cases, note = with_others(cases, others)
        if note:
            console.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    judge = _judge_of(settings, config.model, console)
    with counting(console, "judge's replies") as progress:
        result = judge_answers(
            cases,
            judge,
            ReplyCache(kept.named("judge_cache.jsonl"), judge.name),
            mode=settings.judge_mode,
            max_requests=settings.judge_max_requests,
            on_estimate=lambda estimate: _say_estimate(estimate, judge, settings, console),
            on_progress=progress,
        )
    print_judgement(result.report, console)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in result.records]
    saved = [
        write_json(kept.named("judge.json"), result.report.to_dict()),
        write_text(kept.named("judge_samples.jsonl"), "".join(lines)),
        write_text(kept.named("judge.html"), judge_page(result, cases)),
    ]
    names = ", ".join([str(saved[0]), *(path.name for path in saved[1:])])
    console.print(f"saved {names}", highlight=False, markup=False, soft_wrap=True)


def _judge_of(settings: JudgeSettings, model: ModelSettings, console: Console) -> Judge:
    """The server's model, or one that is loaded here."""
    wanted_judge = str(settings.judge)
    longest, at_a_time = settings.judge_max_new_tokens, settings.judge_concurrency
    if wanted_judge.startswith(("http://", "https://")):
        endpoint = Endpoint(wanted_judge, settings.judge_model, key_variable=settings.judge_key_env, flag="--judge")
        return EndpointJudge(endpoint, longest, at_a_time)
    if settings.judge_model:
        raise UsageError("--judge_model names a model of a server; --judge must be an address then (http://...).")
    resolved = ResolvedModel(settings=ModelSettings(model=wanted_judge, hub=model.hub, engine=model.engine))
    loaded, template = load_source(resolved, console)
    return LoadedJudge(loaded, template, longest, at_a_time)


def _say_estimate(estimate: Estimate, judge: Judge, settings: JudgeSettings, console: Console) -> None:
    tokens = ""
    if estimate.prompt_tokens:
        tokens = f", about {estimate.prompt_tokens:,} tokens in and {estimate.completion_tokens:,} out"
        price_in, price_out = settings.prices or (0.0, 0.0)
        cost = price_in * estimate.prompt_tokens + price_out * estimate.completion_tokens
        tokens += f", a cost of about {cost:.2f}" if cost else ""
    line = (
        f"judge {judge.name}: {estimate.requests:,} requests ({estimate.cached:,} more are in the cache){tokens}; "
        f"about {estimate.seconds:.0f} s with {judge.at_a_time} at a time, by the first of them"
    )
    console.print(line, highlight=False, markup=False, soft_wrap=True)
