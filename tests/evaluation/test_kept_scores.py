"""A stopped evaluation goes on; nothing that has changed is taken for finished."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from unsloth_factory.commands import evaluate as command
from unsloth_factory.config.commands import EvaluateConfig
from unsloth_factory.config.settings import FinishedRun, ModelSettings, TuningSettings
from unsloth_factory.evaluation.choice.benchmark import load_benchmark
from unsloth_factory.evaluation.choice.kept_scores import KeptScores
from unsloth_factory.evaluation.choice.prompts import PromptMaker
from unsloth_factory.evaluation.choice.scored import ChoiceOptions, evaluate
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder, RunManifest

SUBJECTS = ("bones", "herbs", "salts")


class CharTokenizer:
    """One token a character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(char) for char in text]

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [self.encode(text) for text in texts]}


@pytest.fixture
def task(tmp_path) -> Path:
    header = "question,A,B,answer\n"
    for split in ("dev", "val"):
        (tmp_path / split).mkdir()
        for subject in SUBJECTS:
            rows = "".join(f"{subject}{split}{i},是{i},否{i},{'AB'[i % 2]}\n" for i in range(3))
            (tmp_path / split / f"{subject}.csv").write_text(header + rows, encoding="utf-8")
    (tmp_path / "toy.yaml").write_text(
        'layout: "{split}/{subject}.csv"\nletters: [A, B]\nfolder: .\nsubjects: [bones, herbs, salts]\n'
        'prompts: {zh: {intro: "", question: "{question}\\n{choices}\\n答："}}',
        encoding="utf-8",
    )
    return tmp_path / "toy.yaml"


class Model:
    """Scores by the prompt's text, counts its calls, and is stopped at the call of that number."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls = 0
        self._stop = stop

    def __call__(self, prompts, choices):
        self.calls += 1
        if self.calls == self._stop:
            raise KeyboardInterrupt
        return np.array([[-sum(ids) / 997, -sum(ids) % 991 / 7] for ids in prompts])


def score(task: Path, model: Model, *, identity: str = "m", n_shot: int = 1):
    benchmark = load_benchmark(str(task))
    maker = PromptMaker(benchmark=benchmark, tokenizer=CharTokenizer(), template=None)
    kept = KeptScores(task.parent / "kept", identity)
    result = evaluate(maker, task.parent, {"base": model}, ChoiceOptions(n_shot=n_shot), kept={"base": kept})
    return result, kept.found


def test_a_stopped_run_goes_on_and_ends_as_if_it_had_not_been_stopped(task, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        score(task, Model(stop=3))
    model = Model()
    result, found = score(task, model)
    assert (model.calls, found) == (1, 2)
    maker = PromptMaker(benchmark=load_benchmark(str(task)), tokenizer=CharTokenizer(), template=None)
    whole = evaluate(maker, task.parent, {"base": Model()}, ChoiceOptions(n_shot=1))
    assert result == whole
    again = Model()
    assert score(task, again)[0] == whole
    assert again.calls == 0


def test_what_has_changed_is_scored_anew(task):
    score(task, Model())
    for change in ({"identity": "other"}, {"n_shot": 2}):
        model = Model()
        assert score(task, model, **change)[1] == 0
        assert model.calls == 3
    path = task.parent / "val/herbs.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("是1", "不是1"), encoding="utf-8")
    model = Model()
    assert score(task, model)[1] == 2
    assert model.calls == 1


def test_a_damaged_file_is_computed_again(task):
    whole, _ = score(task, Model())
    files = sorted((task.parent / "kept").glob("*.json"))
    assert len(files) == 3
    files[0].write_text(files[0].read_text(encoding="utf-8")[:-9], encoding="utf-8")
    kept = json.loads(files[1].read_text(encoding="utf-8"))
    files[1].write_text(json.dumps(kept | {"logprobs": kept["logprobs"][:2]}), encoding="utf-8")
    files[2].write_text(json.dumps(kept), encoding="utf-8")  # of another subject
    model = Model()
    assert score(task, model)[0] == whole
    assert model.calls == 3
    assert score(task, Model())[1] == 3
    files[0].write_text(json.dumps({"logprobs": kept["logprobs"]}), encoding="utf-8")  # of nobody knows what
    assert score(task, Model())[1] == 2


def test_scores_that_are_no_numbers_are_not_kept(task):
    with np.errstate(invalid="ignore"):
        kept = KeptScores(task.parent / "kept", "m")
        kept.write("bones", [], np.array([[np.nan, 0.0]]))
    assert not (task.parent / "kept").exists()


def test_another_adapter_is_scored_anew_and_the_base_is_not(task, random_model_dir, tmp_path, capsys):
    import torch

    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.write(RunManifest(command="sft", model=str(random_model_dir), base_fingerprint="", thinking="off"))

    def train(seed: int) -> None:
        settings = ModelSettings(model=str(random_model_dir))
        loaded = load_model(settings, for_training=True, tuning=TuningSettings(lora_r=4), seed=1)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in loaded.trainable_parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        loaded.save_adapter(folder.final_adapter)

    def tuned() -> list:
        config = EvaluateConfig(source=FinishedRun(run=str(folder.path)), task=str(task), n_shot=1)
        assert command.run(config) == 0
        lines = (folder.evaluation_results / "toy_samples.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["tuned"]["logprobs"] for line in lines]

    train(1)
    first = tuned()
    assert "were there" not in capsys.readouterr().out
    assert tuned() == first
    assert "6 subjects' scores" in capsys.readouterr().out
    train(2)
    assert tuned() != first
    assert "3 subjects' scores" in capsys.readouterr().out
