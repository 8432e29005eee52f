"""Tasks of lm-evaluation-harness through our model: the same numbers as through the harness' own. See `make peers`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun, ModelSettings, TuningSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.evaluation.harness import model as lm_harness
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder, RunManifest

DOCS = [
    ("高血压患者应", ["低盐饮食", "高盐", "饮酒 很多", "熬夜"], 0, "高血压患者应低盐饮食，按时服药。" * 260),
    ("发热超过三天应", ["就医", "等待", "加大剂量", "不管"], 1, "发热超过三天应及时就医。"),
    ("The quick brown fox ", ["jumps", "sleeps", "eats", "sings a song"], 2, "The quick brown fox jumps."),
]
MULTIPLE = """
output_type: multiple_choice
doc_to_text: "{{question}}\\n答："
doc_to_choice: "{{choices}}"
doc_to_target: answer
fewshot_split: test
num_fewshot: 1
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm}]
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "。", "h"], max_gen_toks: 70, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [dict(zip(("question", "choices", "answer", "text"), doc, strict=True)) for doc in DOCS]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("own_mc", MULTIPLE), ("own_gen", GENERATED), ("own_ppl", ROLLING)):
        source = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
        (folder / f"{name}.yaml").write_text(f"{source}test_split: test\n{text}", encoding="utf-8")
    return folder


@pytest.mark.peer
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_equal_to_the_harness_own_model(tasks, random_model_dir, chat):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    loaded = load_model(ModelSettings(model=str(random_model_dir)))
    template = ChatTemplate.from_tokenizer(loaded.tokenizer)
    models = {
        "ours": lm_harness.harness_model(loaded, template, batch_size=4),
        "theirs": HFLM(pretrained=str(random_model_dir), device="cpu", dtype="float32", batch_size=2),
    }
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = ["own_mc", "own_gen", "own_ppl"]
    results = {
        key: simple_evaluate(
            model=model, tasks=names, task_manager=manager, apply_chat_template=chat, bootstrap_iters=1
        )
        for key, model in models.items()
    }
    ours, theirs = results["ours"], results["theirs"]
    for name in names:
        for key, value in theirs["results"][name].items():
            wanted = pytest.approx(value, rel=1e-4) if "perplexity,none" in key else value
            assert ours["results"][name][key] == wanted, key
        for given, wanted in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            assert given["doc_id"] == wanted["doc_id"]
            assert given["prompt_hash"] == wanted["prompt_hash"]
            if name == "own_gen":
                assert given["filtered_resps"] == wanted["filtered_resps"]
            elif name == "own_ppl":
                assert given["filtered_resps"] == pytest.approx(wanted["filtered_resps"], rel=1e-5)
            else:
                for (value, greedy), (other, other_greedy) in zip(
                    given["filtered_resps"], wanted["filtered_resps"], strict=True
                ):
                    assert value == pytest.approx(other, abs=1e-3)
                    assert greedy == other_greedy
    assert isinstance(ours["results"]["own_mc"]["acc_stderr,none"], float)
    assert any(sample["filtered_resps"][0] for sample in ours["samples"]["own_gen"])
    long = loaded.tokenizer.encode(DOCS[0][3])
    assert len(long) > 2 * loaded.max_positions, "the last window is as long as it is whatever the one before it read"


@pytest.mark.peer
def test_through_the_command_with_base_and_tuned(tasks, random_model_dir, tmp_path, capsys):
    import torch

    pytest.importorskip("lm_eval")
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(RunManifest(command="sft", model=str(random_model_dir), base_fingerprint="", thinking="off"))
    loaded = load_model(
        ModelSettings(model=str(random_model_dir)), for_training=True, tuning=TuningSettings(lora_r=4), seed=1
    )
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    loaded.save_adapter(folder.final_adapter)
    config = EvaluateConfig(
        source=FinishedRun(run=str(folder.path)), task="lm_eval:own_mc", lm_eval_include=str(tasks), max_samples=2
    )
    assert command.run(config) == 0
    report = json.loads((folder.evaluation_results / "lm_eval_own_mc.json").read_text(encoding="utf-8"))
    assert (report["n"], report["headline"]) == (2, "acc")
    assert report["metrics"]["tuned"]["acc"]["n"] == 2
    assert {"acc", "acc_norm"} == set(report["comparisons"])
    lines = (folder.evaluation_results / "lm_eval_own_mc_samples.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert records[0]["base"]["responses"] != records[0]["tuned"]["responses"]
    share = sum(record["tuned"]["acc"] for record in records) / 2
    assert report["metrics"]["tuned"]["acc"]["value"] == share
    assert "acc *" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"has no such task. Did you mean .*own_mc"):
        command.run(EvaluateConfig(task="lm_eval:own_mcc", lm_eval_include=str(tasks)))
    (tasks / "data.jsonl").unlink()
    with pytest.raises(UserError, match="lm_eval:own_gen could not be loaded"):
        command.run(EvaluateConfig(task="lm_eval:own_gen", lm_eval_include=str(tasks)))


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'lm-eval==0\.4\.13'"):
        command.run(EvaluateConfig(task="lm_eval:hellaswag"))


@pytest.mark.parametrize("change", [{"subjects": "x"}, {"choice_mode": "text"}, {"scorer": "f1"}, {"split": "val"}])
def test_flags_that_a_task_of_the_harness_has_no_use_for(monkeypatch, change):
    monkeypatch.setattr(lm_harness, "find_spec", lambda name: True)
    with pytest.raises(UsageError, match=f"--{next(iter(change))} is not for tasks of lm-evaluation-harness"):
        command.run(EvaluateConfig(task="lm_eval:own", **change))


def fabricated(share: dict[str, str], *, weighted: bool) -> dict:
    """A result of the harness: a group of two tasks whose questions are right (1) or wrong (0)."""
    import numpy as np

    means = {name: float(np.mean([int(x) for x in answers])) for name, answers in share.items()}
    every = [int(x) for answers in share.values() for x in answers]
    results = {name: {"acc,none": mean, "acc_stderr,none": 0.1, "alias": name} for name, mean in means.items()}
    group = float(np.mean(every)) if weighted else float(np.mean(list(means.values())))
    return {
        "results": {**results, "own": {"acc,none": group, "acc_stderr,none": "N/A"}},
        "group_subtasks": {"own": ["inner"], "inner": list(share)},
        "samples": {
            name: [{"doc_id": i, "filter": "none", "acc": float(x), "metrics": ["acc"]} for i, x in enumerate(answers)]
            for name, answers in share.items()
        },
        "n-samples": {name: {"effective": len(answers)} for name, answers in share.items()},
        "higher_is_better": {name: {"acc": True} for name in share},
    }


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_is_compared_as_it_is_averaged(weighted):
    from unsloth_factory.evaluation.harness import report as harness_report

    shares = {"base": {"a": "11111111", "b": "01"}, "tuned": {"a": "00000001", "b": "01"}}
    results = {variant: fabricated(share, weighted=weighted) for variant, share in shares.items()}
    metrics = {variant: dict(harness_report._metrics(result)) for variant, result in results.items()}
    compared = dict(harness_report._comparisons(results, metrics))
    assert list(compared) == ["a acc", "b acc", "own acc"]
    assert compared["a acc"].p_value == pytest.approx(2 / 2**7)
    assert compared["b acc"].verdict == "no difference beyond the error"
    assert compared["own acc"].delta == pytest.approx(-0.7 if weighted else -7 / 16)
    assert compared["own acc"].verdict == "worse"
    if weighted:
        assert compared["own acc"].p_value == pytest.approx(2 / 2**7)
    else:
        low, high = compared["own acc"].interval
        assert (high - low) / 2 == pytest.approx(1.959964 * (7 / 8 * 1 / 8 / 7) ** 0.5 / 2)
    assert harness_report._headline(results["base"], "own") == "own acc"
    assert harness_report._without_error(results["base"]) == ["own acc"]
    assert metrics["base"]["own acc"].better == "higher"
