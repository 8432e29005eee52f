"""Run tasks of lm-evaluation-harness for each variant of a model, and put its results into our report."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.evaluation.averages import compare, macro_metric, mean_metric, normal_p
from unsloth_factory.evaluation.harness.model import PREFIX
from unsloth_factory.evaluation.report import Comparison, EvalReport, Metric
from unsloth_factory.scoring import mcnemar

LONGEST_PROBLEM = 300
"""Characters of another's error that are shown."""
BOOTSTRAPS = 1000
"""Resamples of the standard error of metrics that have no formula for it."""


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """What is run, and how."""

    task: str
    """Name of a task or group of the harness."""
    include: str | None = None
    """Folder of further tasks' YAML files."""
    n_shot: int | None = None
    """None for the task's own."""
    max_samples: int | None = None
    max_new_tokens: int | None = None
    """None for the task's own."""
    chat_template: bool = True


def load_tasks(options: HarnessOptions) -> Any:
    """The harness' task manager, once it has loaded the task and its data.

    Raises:
        UsageError: There is no such task, or no such folder.
        UserError: Its data cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if options.include and not Path(options.include).expanduser().is_dir():
        raise UsageError(f"--lm_eval_include {options.include} is no folder.")
    include = str(Path(options.include).expanduser()) if options.include else None
    problem: Exception | None = None
    # The harness' own index of thousands of tasks takes seconds: a folder of one's own is looked into alone first.
    for defaults in (False, True) if include else (True,):
        manager = TaskManager(include_path=include, include_defaults=defaults)
        if options.task not in manager.all_tasks:
            continue
        try:
            manager.load([options.task])
        except Exception as error:  # others' code, and datasets has errors of its own
            problem = error
        else:
            return manager
    if problem:
        raise UserError(
            f"{PREFIX}{options.task} could not be loaded: {_brief(problem)}. The harness takes a task's data "
            "from where its YAML says, most of them from the Hugging Face hub."
        ) from problem
    close = difflib.get_close_matches(options.task, manager.all_tasks, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise UsageError(
        f"--task {PREFIX}{options.task}: lm-evaluation-harness has no such task.{hint} "
        "A folder of one's own: --lm_eval_include FOLDER."
    )


def _brief(problem: Exception) -> str:
    """The error in one line."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    return text if len(text) <= LONGEST_PROBLEM else text[:LONGEST_PROBLEM] + "..."


def evaluate_harness(
    manager: Any,
    lm: Any,
    variants: Mapping[str, Callable[[], AbstractContextManager[Any]]],
    options: HarnessOptions,
    model: dict[str, Any],
) -> tuple[EvalReport, list[dict[str, Any]]]:
    """Run the task once for each variant.

    Args:
        manager: As `load_tasks` gives it.
        lm: As `harness_model` gives it.
        variants: variant -> what makes the model answer as it.
        options: What is run.
        model: Path, adapter, engine and so on, for the report.

    Returns:
        The report, and one record a question and filter.
    """
    from lm_eval import simple_evaluate

    results: dict[str, Any] = {}
    for variant, entered in variants.items():
        with entered(), _one_process():
            results[variant] = simple_evaluate(
                model=lm,
                tasks=[options.task],
                task_manager=manager,
                num_fewshot=options.n_shot,
                limit=options.max_samples,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
                gen_kwargs={"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None,
                log_samples=True,
            )
    first = next(iter(results.values()))
    metrics = {variant: dict(_metrics(result)) for variant, result in results.items()}
    unsure = sorted({name for result in results.values() for name in _without_error(result)})
    report = EvalReport(
        task=f"{PREFIX}{options.task}",
        model=model,
        settings={
            "benchmark": f"{PREFIX}{options.task}",
            "lm_eval": first["lm_eval_version"],
            "version": first["versions"],
            "n_shot": first["n-shot"],
            "max_samples": options.max_samples,
            "max_new_tokens": options.max_new_tokens,
            "chat_template": options.chat_template,
            "thinking": None,
        },
        n=sum(counts["effective"] for counts in first["n-samples"].values()),
        metrics=metrics,
        comparisons=dict(_comparisons(results, metrics)) if {"base", "tuned"} <= results.keys() else {},
        headline=_headline(first, options.task),
        notes=(f"The harness gives no standard error of {', '.join(unsure)}.",) if unsure else (),
        details={"n_samples": first["n-samples"], "groups": sorted(first.get("groups") or {})},
    )
    return report, list(_records(results))


def _headline(result: Mapping[str, Any], task: str) -> str:
    """The first metric of what was asked for: of a group, not of its first task."""
    names = [(name, of) for name, of, *_ in _values(result)]
    return next((name for name, of in names if of == task), names[0][0] if names else "")


@contextmanager
def _one_process() -> Iterator[None]:
    """Keep the harness from forking for its bootstrap: a fork behind OpenMP's threads can hang."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]


def _values(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str, float, Any]]:
    """(our name, task, metric, filter, value, standard error) of each number of a result."""
    several = len(result["results"]) > 1
    for task, values in result["results"].items():
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            name = f"{task} {metric}" if several else metric
            name = name if kept == "none" else f"{name} ({kept})"
            yield name, task, metric, kept, float(value), values.get(f"{metric}_stderr,{kept}")


def _metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    for name, task, metric, _, value, error in _values(result):
        if not math.isfinite(value):
            continue
        count = result["n-samples"].get(task, {}).get("effective") or result["results"][task].get("sample_len", 0)
        ups = [result["higher_is_better"].get(leaf, {}).get(metric) for leaf in (task, *_leaves(result, task))]
        up = next((given for given in ups if given is not None), None)
        direction = "neutral" if up is None else "higher" if up else "lower"
        yield name, Metric(value, float(error) if isinstance(error, Real) else 0.0, int(count), direction)  # type: ignore[arg-type]


def _without_error(result: Mapping[str, Any]) -> list[str]:
    return [name for name, *_, error in _values(result) if not isinstance(error, Real)]


def _comparisons(
    results: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Metric]]
) -> Iterator[tuple[str, Comparison]]:
    """Paired by question, of the metrics that are means of one number a question: not of perplexities and BLEU.

    A group is the mean over its questions, or over its tasks; which of them is seen by its value.
    """
    for name, task, metric, kept, value, _ in _values(results["base"]):
        if name not in metrics["base"] or name not in metrics["tuned"]:
            continue
        pairs = [
            (_by_question(results["base"], leaf, metric, kept), _by_question(results["tuned"], leaf, metric, kept))
            for leaf in _leaves(results["base"], task)
        ]
        if not pairs or not all(before and before.keys() == after.keys() for before, after in pairs):
            continue
        changes = [np.array([after[question] - before[question] for question in before]) for before, after in pairs]
        questions = [answer for before, _ in pairs for answer in before.values()]
        means = [float(np.mean(list(before.values()))) for before, _ in pairs]
        every = np.concatenate(changes)
        if math.isclose(value, float(np.mean(questions)), abs_tol=1e-9):
            difference = mean_metric(every)
        elif math.isclose(value, float(np.mean(means)), abs_tol=1e-9):
            difference = macro_metric([mean_metric(change) for change in changes])
        else:
            continue
        p_value = normal_p(difference.value, difference.standard_error)
        if set(np.unique(every)) <= {-1.0, 0.0, 1.0} and math.isclose(difference.value, float(every.mean())):
            p_value = mcnemar(int((every < 0).sum()), int((every > 0).sum()))
        yield (
            name,
            compare(
                metrics["base"][name].value,
                metrics["tuned"][name].value,
                difference.standard_error,
                p_value,
                metrics["base"][name].better,
            ),
        )


def _leaves(result: Mapping[str, Any], task: str) -> list[str]:
    """The tasks of a group, itself for a task."""
    if task in (result.get("samples") or {}):
        return [task]
    return [leaf for child in result.get("group_subtasks", {}).get(task, []) for leaf in _leaves(result, child)]


def _by_question(result: Mapping[str, Any], task: str, metric: str, kept: str) -> dict[int, float]:
    samples = (result.get("samples") or {}).get(task, [])
    return {
        sample["doc_id"]: float(sample[metric])
        for sample in samples
        if sample.get("filter") == kept and isinstance(sample.get(metric), Real)
    }


def _records(results: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    first = next(iter(results.values()))
    for task, samples in (first.get("samples") or {}).items():
        for place, sample in enumerate(samples):
            record: dict[str, Any] = {"task": task, "id": sample["doc_id"], "filter": sample.get("filter")}
            record |= {"prompt_sha256": sample.get("prompt_hash"), "target": str(sample.get("target"))}
            for variant, result in results.items():
                given = result["samples"][task][place]
                record[variant] = {
                    "responses": given.get("filtered_resps"),
                    **{name: given[name] for name in given.get("metrics", []) if name in given},
                }
            yield record
