"""Several tasks or several models in one command: loads, tables, verdicts, files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.commands import source
from unsloth_factory.commands.evaluating import many as evaluate_many
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.parse import parse
from unsloth_factory.config.settings import FinishedRun, ModelSettings, TuningSettings
from unsloth_factory.evaluation.compare import forgetting, selection
from unsloth_factory.evaluation.compare.outcome import Outcome, paired, read_outcome
from unsloth_factory.evaluation.compare.selection import Candidate, select
from unsloth_factory.evaluation.report import Comparison, Metric
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder, RunManifest

HEADER = "question,A,B,answer\n"


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "herbs.csv"
    path.write_text(HEADER + "".join(f"草药{i}？,是{i},否{i},{'AB'[i % 2]}\n" for i in range(6)), encoding="utf-8")
    return path


def values(answers: str) -> dict[str, float]:
    return {str(place): float(answer) for place, answer in enumerate(answers)}


def test_paired_takes_common_questions_and_mcnemars_test():
    compared = paired(values("111111110"), values("1100000001"))
    assert (compared.base, compared.tuned) == (8 / 9, 2 / 9)
    assert compared.p_value == pytest.approx(2 * 1 / 2**6)  # 6 of 6 heads
    assert compared.verdict == "worse"
    assert paired({"a": 1.0}, {"b": 1.0}) is None
    shares = paired({"a": 0.5, "b": 0.25, "c": 1.0}, {"a": 0.75, "b": 0.5, "c": 0.9})
    assert shares.delta == pytest.approx(0.4 / 3)
    assert 0 < shares.p_value < 1


def candidate(name: str, answers: str, parameters: int) -> Candidate:
    share = answers.count("1") / len(answers)
    score = Metric(share, math.sqrt(share * (1 - share) / (len(answers) - 1)), len(answers))
    return Candidate(
        name=name, parameters=parameters, disk_bytes=2 * parameters, memory_bytes=3 * parameters, load_seconds=1.25,
        seconds=4.0, n=len(answers), score=score, values=values(answers),
    )  # fmt: skip


def test_the_best_comes_first_and_the_smallest_that_is_not_told_apart_is_named():
    chosen = select(
        "T",
        "accuracy",
        [
            candidate("weak", "1100000000", 10**9),
            Candidate(name="broken", failed="no such folder"),
            candidate("large", "1111111111", 8 * 10**9),
            candidate("small", "1111111100", 2 * 10**9),
        ],
    )
    assert [c.name for c in chosen.candidates] == ["large", "small", "weak", "broken"]
    assert chosen.to_best["weak"].p_value == pytest.approx(2 / 2**8)
    assert (chosen.to_best["weak"].verdict, chosen.to_best["small"].p_value) == ("worse", 0.5)
    rows = selection.rows(chosen)
    assert rows[0][:7] == ["large", "1.000±0.000", "best", "", "8.00 B", "24.00", "2.5"]
    assert rows[1][1:4] == ["0.800±0.133", "-0.200", "0.5"]
    assert rows[2][2] == "-0.800 worse"
    assert rows[3][:2] == ["broken", "failed"]
    assert chosen.notes[:3] == (
        "broken failed: no such folder",
        "Not told apart from the best by 10 questions: small.",
        "The smallest of these is small (2.00 B).",
    )
    page = selection.html(chosen)
    assert page.count("<circle") == 3
    assert "http" not in page
    assert "| weak | 0.200±0.133 | -0.800 worse |" in selection.markdown(chosen)
    json.dumps(chosen.to_dict(), allow_nan=False)
    assert "values" not in chosen.to_dict()["models"][0]


def test_names_are_taken_until_the_next_flag():
    for words in (["--models", "a", "org/b", "c", "--n_shot", "2"], ["--models", "a,org/b,c", "n_shot=2"]):
        config = parse(EvaluateConfig, words).config
        assert (config.models, config.n_shot) == ("a,org/b,c", 2)


def test_models_through_the_command(questions, random_model_dir, tmp_path, capsys, pytestconfig):
    other = tmp_path / "other"
    root = next(p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "make_random_model"))
    root.make_random_model(other, layers=1, hidden=32)
    broken = tmp_path / "broken"
    shutil.copytree(other, broken)
    (broken / "model.safetensors").unlink()
    out = tmp_path / "out"
    config = EvaluateConfig(models=f"{random_model_dir},{broken},{other}", task=str(questions), save_dir=str(out))
    assert command.run(config) == 0
    report = json.loads((out / "models.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["models"]}
    assert rows[str(broken)]["failed"]
    scored = [rows[str(random_model_dir)], rows[str(other)]]
    assert all(row["memory_bytes"] > row["disk_bytes"] > 4 * row["parameters"] * 0.9 for row in scored)
    assert all(row["questions_per_second"] > 0 and row["load_seconds"] > 0 for row in scored)
    assert scored[0]["parameters"] > scored[1]["parameters"]
    for row, folder in zip(scored, ("1-*", "3-*"), strict=True):
        single = json.loads(next(out.glob(f"{folder}/herbs.json")).read_text(encoding="utf-8"))
        assert row["score"] == single["metrics"]["base"]["macro accuracy"]
    assert report["models"][1]["to_best"]["base"] == report["models"][0]["score"]["value"]
    assert (out / "models.md").is_file()
    assert (out / "models.html").is_file()
    assert f"{broken} failed" in capsys.readouterr().out
    assert source._KEPT.get() is None
    assert command.run(config) == 0
    again = json.loads((out / "models.json").read_text(encoding="utf-8"))
    assert again["models"][0]["questions_per_second"] == 0, "answers of an earlier run say nothing of the speed"


def test_models_are_refused_before_any_is_loaded(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_many, "load_source", lambda *_: pytest.fail("loaded"))
    for change, message in (
        ({"models": "a"}, "two models or more"),
        ({"models": "a,a"}, "two models or more"),
        ({"models": "a,b", "task": "ceval,cmmlu"}, "one --task"),
        ({"models": "a,b", "model": ModelSettings(model="c")}, "do not go with it"),
        ({"models": f"tiny,{tmp_path}/none"}, "there is no .*none"),
        ({"models": "a,b", "task": "cevall"}, "Did you mean ceval"),
    ):
        with pytest.raises(UsageError, match=message):
            command.run(EvaluateConfig(**{"task": str(questions), **change}))
    monkeypatch.setattr(evaluate_many, "load_source", refuse)
    with pytest.raises(UserError, match="No model could be scored"):
        command.run(EvaluateConfig(models="tiny,tiny2", task=str(questions), save_dir=str(tmp_path)))


def refuse(*_):
    raise UserError("too large")


def outcome(task: str, base: float, tuned: float, verdict: str) -> Outcome:
    delta = tuned - base
    compared = Comparison(base, tuned, delta, (delta - 0.1, delta + 0.1), 0.01, verdict)
    metrics = {name: {"accuracy": Metric(value, 0.05, 40)} for name, value in (("base", base), ("tuned", tuned))}
    return Outcome(task, 40, "accuracy", metrics, {"accuracy": compared}, {})


def test_significant_losses_come_first_and_are_named():
    within = "no difference beyond the error"
    table = forgetting.collect([outcome("same", 0.5, 0.45, within), outcome("won", 0.5, 0.8, "better"),
                                outcome("lost", 0.6, 0.3, "worse")])  # fmt: skip
    rows = forgetting.rows(table)
    assert [(row[0], row[-1]) for row in rows] == [("lost", "LOSS"), ("same", ""), ("won", "gain")]
    assert rows[0][3:8] == ["0.600±0.050", "0.300±0.050", "-0.300", "[-0.400, -0.200]", "0.01"]
    assert forgetting.conclusion(table) == "Significant loss on 1 of 3 tasks: lost."
    assert "| lost |" in forgetting.markdown(table)
    assert table.to_dict()["losses"] == ["lost"]
    none = forgetting.collect([outcome("same", 0.5, 0.45, within)])
    assert forgetting.conclusion(none).startswith("No significant loss on 1 tasks")


def test_tasks_through_the_command_with_one_load(questions, random_model_dir, tmp_path, capsys, monkeypatch):
    import torch

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(RunManifest(command="sft", model=str(random_model_dir), base_fingerprint="", thinking="off"))
    settings = ModelSettings(model=str(random_model_dir))
    loaded = load_model(settings, for_training=True, tuning=TuningSettings(lora_r=4), seed=1)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    loaded.save_adapter(folder.final_adapter)
    (tmp_path / "data/gsm8k").mkdir(parents=True)
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split}{i}+1?", "answer": f"#### {i + 1}"}) for i in range(3)]
        (tmp_path / f"data/gsm8k/{split}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    loads, original = [], source._load_source
    monkeypatch.setattr(source, "_load_source", lambda *args: (loads.append(1), original(*args))[1])
    config = EvaluateConfig(
        source=FinishedRun(run=str(folder.path)), task=f"{questions}, gsm8k", task_dir=str(tmp_path / "data"), n_shot=1,
        max_new_tokens=3, scorer="number",
    )  # fmt: skip
    assert command.run(config) == 0
    assert loads == [1]
    report = json.loads((folder.evaluation_results / "tasks.json").read_text(encoding="utf-8"))
    assert {row["task"] for row in report["tasks"]} == {"herbs test", "GSM8K test"}
    single = read_outcome(folder.evaluation_results, "herbs")
    herbs = next(row for row in report["tasks"] if row["task"] == "herbs test")
    assert herbs["scores"]["tuned"]["value"] == single.score("tuned").value
    assert herbs["comparison"]["delta"] == single.comparisons["macro accuracy"].delta
    assert set(single.values["base"].values()) <= {0.0, 1.0}
    assert len(single.values["base"]) == 6
    assert "| herbs test | macro accuracy | 6 |" in (folder.evaluation_results / "tasks.md").read_text("utf-8")
    assert "tasks" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is named twice"):
        command.run(EvaluateConfig(**{**vars(config), "task": f"{questions},{questions}"}))
