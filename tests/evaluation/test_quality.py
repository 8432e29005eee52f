"""What quantising costs: figures against independent computations, the gate, and its pick on the way to `uf deploy`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from unsloth_factory.commands import deploy, quality, quantize
from unsloth_factory.commands import run as plan
from unsloth_factory.commands.summary import collect, print_summary
from unsloth_factory.config.commands import DeployConfig, QualityConfig, QuantizeConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, FinishedRun, GateSettings, ModelSettings
from unsloth_factory.data.split import write_validation_split
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Conversation, TokenSample, Turn
from unsloth_factory.evaluation.quality import token_scores as measuring
from unsloth_factory.evaluation.quality.gate import FileQuality, Value, judge, pick, quality_values
from unsloth_factory.evaluation.quality.kept import KeptQuality
from unsloth_factory.evaluation.quality.pages import QualityReport, html_page, markdown_page, quality_table
from unsloth_factory.evaluation.quality.token_scores import TokenScores, answer_samples, score_file, score_reference
from unsloth_factory.inference.llama_cpp import LlamaCpp
from unsloth_factory.inference.perplexity import answer_losses
from unsloth_factory.model.load import load_model
from unsloth_factory.run.folder import RunFolder, RunManifest

ROOT = Path(__file__).resolve().parents[2]
HANDBOOK = ROOT / "unsloth_factory" / "assets" / "demo" / "handbook_questions.jsonl"


def handbook(count: int) -> list[tuple[str, str]]:
    """(question, answer) of the bundled ones."""
    rows = [json.loads(line) for line in HANDBOOK.read_text(encoding="utf-8").splitlines()[:count]]
    return [(row["question"], row["answer"]) for row in rows]


def sample(ids: list[int], trained: list[int]) -> TokenSample:
    marks = np.zeros(len(ids), dtype=bool)
    marks[trained] = True
    return TokenSample(np.array(ids, dtype=np.int32), marks, "t")


@pytest.fixture(scope="module")
def loaded():
    return load_model(ModelSettings(model="tiny"))


@pytest.fixture(scope="module")
def samples(loaded) -> list[TokenSample]:
    """Three of the bundled questions, and a conversation with two answers."""
    template = ChatTemplate.from_tokenizer(loaded.tokenizer)
    chats = [(Turn("user", question), Turn("assistant", answer)) for question, answer in handbook(3)]
    chats.append((*chats[0], *chats[1]))
    return [row for turns in chats for row in template.encode_conversation(Conversation(turns, "h"))]


@pytest.fixture(scope="module")
def measured(samples, tiny_ggufs) -> tuple[TokenScores, TokenScores]:
    """(f16, q4_0), in pieces of three tokens."""
    store = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "LOGITS_TOGETHER", 3 * 5120)
        with LlamaCpp(tiny_ggufs["f16"], exact=True) as llama:
            reference = score_reference(llama, samples, store)
            vocabulary = llama.vocab_size
        with LlamaCpp(tiny_ggufs["q4_0"], exact=True) as llama:
            return reference, score_file(llama, samples, store, vocabulary)


def test_every_token_s_figures_equal_those_from_all_logits_at_once(measured, samples, tiny_ggufs):
    kls, losses, tops = [], [], []
    with LlamaCpp(tiny_ggufs["f16"], exact=True) as one, LlamaCpp(tiny_ggufs["q4_0"], exact=True) as other:
        for row in samples:
            at = torch.from_numpy(row.trained).nonzero()[:, 0]
            ids = row.ids.tolist()
            p, q = (torch.tensor(model.logits(ids)).double().log_softmax(-1)[at - 1] for model in (one, other))
            kls.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
            losses.append(-q[torch.arange(len(at)), torch.from_numpy(row.ids).long()[at]])
            tops.append(p.argmax(-1) == q.argmax(-1))
    found = measured[1]
    kl = torch.cat(kls).numpy()
    assert kl.max() > 0.01
    np.testing.assert_allclose(found.divergence, kl, rtol=0.05, atol=2e-4)  # single rows are rounded another way
    np.testing.assert_allclose(found.loss, torch.cat(losses).numpy(), rtol=0.02, atol=2e-3)
    assert (found.same_top == torch.cat(tops).numpy()).mean() > 0.95
    assert found.answer.tolist() == [i for i, row in enumerate(samples) for _ in range(row.trained.sum())]


def test_perplexity_of_the_f16_file_equals_that_of_transformers(measured, samples, loaded):
    losses = answer_losses(loaded, samples)
    mean = sum(loss.total for loss in losses) / sum(loss.tokens for loss in losses)
    values, _ = quality_values(measured[0], measured[0])
    assert len(measured[0].loss) == sum(loss.tokens for loss in losses)
    assert values["perplexity"].value == pytest.approx(np.exp(mean), rel=5e-3)
    assert values["max KL"].value == 0
    assert values["same top token"].value == values["perplexity ratio"].value == 1


def test_each_answer_is_read_behind_all_that_stands_before_it():
    calls = []

    def tail_logits(ids, last):
        calls.append((ids, last))
        return np.zeros((last, 7))

    rows = [sample([1, 2, 3, 4, 5, 6, 1, 2], [2, 3, 6, 7]), sample([5, 5], [0, 1])]
    found = list(measuring._answers(tail_logits, 7, rows, None))
    assert calls == [([1, 2, 3], 2), ([1, 2, 3, 4, 5, 6, 1], 2), ([5], 1)]
    assert [(at, targets.tolist()) for at, targets, _ in found] == [(0, [3, 4]), (0, [1, 2]), (1, [5])]


def scores(divergence: list[float], answer: list[int], loss: list[float], right=None, same=None) -> TokenScores:
    count = len(answer)
    return TokenScores(
        answer=np.array(answer),
        loss=np.array(loss, dtype=float),
        right=np.array(right or [True] * count),
        divergence=np.array(divergence, dtype=float),
        same_top=np.array(same or [True] * count),
    )


def test_statistics_and_errors_by_hand():
    reference = scores([0] * 4, [0, 0, 1, 1], [1, 1, 2, 2])
    file = scores([0.1, 0.3, 0.0, 0.4], [0, 0, 1, 1], [1.2, 1.0, 2.0, 2.4], [True, False, False, True], [1, 1, 0, 1])
    values, losses = quality_values(reference, file)
    assert values["mean KL"].value == pytest.approx(0.2)
    # Two answers with means 0.2 and 0.2: the tokens differ, the answers do not.
    assert values["mean KL"].error == pytest.approx(0.0, abs=1e-12)
    assert values["max KL"] == Value(0.4)
    assert values["perplexity"].value == pytest.approx(np.exp(6.6 / 4))
    assert values["perplexity ratio"].value == pytest.approx(np.exp(0.6 / 4))
    # Leaving one answer out: exp(0.2) and exp(0.1); sqrt(1/2 * sum of squared deviations) of two values.
    assert values["perplexity ratio"].error == pytest.approx((np.exp(0.2) - np.exp(0.1)) / 2)
    assert values["same top token"].value == 0.75
    assert values["right tokens"].value == 0.5
    change = np.exp(-file.loss) - np.exp(-reference.loss)
    assert values["RMS probability change"].value == pytest.approx(np.sqrt((change**2).mean()))
    assert losses["perplexity"].value == pytest.approx(np.exp(0.15) - 1)
    assert losses["accuracy"].value == 0.5
    assert losses["kl"] == values["mean KL"]


def test_errors_take_the_tokens_of_an_answer_together():
    """Answers whose tokens all agree: the error is that of the answers' mean, not ten times smaller."""
    random = np.random.default_rng(0)
    means = random.exponential(0.1, 30)
    file = scores(list(np.repeat(means, 100)), list(np.repeat(np.arange(30), 100)), [1.0] * 3000)
    error = quality_values(file, file)[0]["mean KL"].error
    assert error == pytest.approx(means.std(ddof=1) / np.sqrt(30))


def quality_of(name: str, size: int, kl: float, error: float, rise: float = 0.0) -> FileQuality:
    losses = {"kl": Value(kl, error), "perplexity": Value(rise, error), "accuracy": Value(0.0, 0.0)}
    values = {key: Value(kl, error) for key in ("perplexity", "mean KL", "99 % KL", "max KL", "same top token")}
    values |= {key: Value(1 + rise, error) for key in ("perplexity ratio", "right tokens", "RMS probability change")}
    return FileQuality(name, f"/x/m-{name}.gguf", "0" * 64, size, values, losses)


def test_the_gate_takes_the_smallest_file_whose_interval_stays_below_the_limit():
    files = [
        FileQuality("f16", "/x/m-f16.gguf", "", 16, {}, {}),
        quality_of("q8_0", 8, 0.001, 0.0001),
        quality_of("q5_0", 5, 0.015, 0.001, rise=-0.5),
        quality_of("q4_0", 4, 0.019, 0.001),  # 0.019 + 1.96 x 0.001 is beyond 0.02
        quality_of("q3_k", 3, 0.5, 0.01, rise=-0.1),
        quality_of("q2_k", 2, float("nan"), 0.0, rise=float("nan")),
    ]
    judged = judge(files, "kl", 0.02)
    assert [file.passed for file in judged] == [None, True, True, False, False, False]
    assert pick(judged).name == "q5_0"
    assert pick(judge(files, "kl", 0.03)).name == "q4_0"
    assert pick(judge(files, "perplexity", 0.02)).name == "q3_k"
    assert pick(judge(files, "kl", 0.0001)) is None


def test_samples_that_fit_and_at_least_two():
    rows = [sample([1] * 10, [8, 9]), sample([1] * 30, [29]), sample([1] * 10, [0]), sample([1] * 10, [7, 8, 9])]
    assert answer_samples(rows, 20, 100) == [rows[0], rows[3]]
    assert answer_samples([rows[0]] * 5, 20, 7) == [rows[0]] * 3
    with pytest.raises(UserError, match=r"1 held-out answers fit .* at least 2 are needed .*--val_split"):
        answer_samples(rows[:3], 20, 100)


def test_kept_scores_belong_to_their_files_engine_and_samples(tmp_path, measured, samples):
    kept = KeptQuality(tmp_path, "ref", "engine 1", samples)
    kept.write("file", measured[1])
    again = KeptQuality(tmp_path, "ref", "engine 1", samples).read("file")
    assert all(np.array_equal(array, measured[1].arrays()[name]) for name, array in again.arrays().items())
    assert kept.read("other") is None
    for changed in (("other", "engine 1", samples), ("ref", "engine 2", samples), ("ref", "engine 1", samples[:2])):
        assert KeptQuality(tmp_path, *changed).read("file") is None
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    assert kept.read("file") is None


@pytest.fixture
def run_folder(tiny_model_dir, tiny_ggufs, tmp_path) -> RunFolder:
    """A fully tuned run with its 16-bit file and six held-out answers."""
    folder = RunFolder(tmp_path / "run")
    folder.write(RunManifest(command="sft", model="tiny", base_fingerprint="", finetuning_type="full", thinking="off"))
    folder.final_model.symlink_to(tiny_model_dir)
    folder.gguf.mkdir()
    shutil.copy(tiny_ggufs["f16"], folder.gguf / "run-f16.gguf")
    chats = [Conversation((Turn("user", q), Turn("assistant", a)), f"h:{i}") for i, (q, a) in enumerate(handbook(6))]
    write_validation_split(folder.validation_split, chats)
    return folder


def test_from_quantising_through_the_gate_to_deploy(run_folder, monkeypatch, capsys):
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nobody there
    source = FinishedRun(run=str(run_folder.path))
    types = "q4_0,q5_0,q8_0"
    assert quantize.run(QuantizeConfig(source=source, types=types, quality=GateSettings(gate=0.03))) == 0
    report = json.loads((run_folder.quality_results / "quality.json").read_text(encoding="utf-8"))
    kl = {file["name"]: file["values"]["mean KL"]["value"] for file in report["files"]}
    assert list(kl) == ["f16", "q8_0", "q5_0", "q4_0"]
    assert kl["f16"] == 0 < kl["q8_0"] < kl["q5_0"] < kl["q4_0"]
    passed = [file["name"] for file in report["files"] if file["passed"]]
    assert report["picked"] == passed[-1] == "q8_0"  # a tiny model loses more in five bits than a large one
    assert "picked" in capsys.readouterr().out
    summary = collect(run_folder)
    assert summary["picked"] == "gguf/run-q8_0.gguf"
    print_summary(summary | {"seconds": 1}, run_folder.path)
    out = capsys.readouterr().out
    assert "q8_0 (picked by the gate)" in out
    assert "q4_0 (picked" not in out
    assert deploy.run(DeployConfig(source=source)) == 0
    assert run_folder.modelfile.read_text(encoding="utf-8").startswith("FROM ./gguf/run-q8_0.gguf\n")
    # Measured once: another gate opens no file.
    monkeypatch.setattr(quality, "LlamaCpp", lambda *_, **__: pytest.fail("measured again"))
    looser = QualityConfig(source=source, quality=GateSettings(gate=2.0))
    assert quality.run(looser) == 0
    assert deploy.run(DeployConfig(source=source)) == 0
    assert run_folder.modelfile.read_text(encoding="utf-8").startswith("FROM ./gguf/run-q4_0.gguf\n")
    with pytest.raises(UserError, match=r"No file has a mean KL divergence of at most 1e-06 .*The best is q8_0 with"):
        quality.run(QualityConfig(source=source, quality=GateSettings(gate=1e-6)))
    assert len(list(run_folder.gguf.glob("*.gguf"))) == 4
    assert "No file has a mean KL" in (run_folder.quality_results / "quality.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"No quantised file of .* passed its quality gate .* at most 1e-06"):
        deploy.run(DeployConfig(source=source))
    assert deploy.run(DeployConfig(source=source, gguf=str(run_folder.gguf / "run-q8_0.gguf"))) == 0
    assert quality.run(looser) == 0
    (run_folder.gguf / "SHA256SUMS").unlink()
    shutil.copy(run_folder.gguf / "run-q5_0.gguf", run_folder.gguf / "run-q4_0.gguf")
    with pytest.raises(UserError, match=r"run-q4_0.gguf is not the file that the quality gate measured"):
        deploy.run(DeployConfig(source=source))


def test_a_gate_without_held_out_answers_is_refused_before_anything_is_quantised(run_folder, tiny_ggufs, tmp_path):
    gate = GateSettings(gate=0.02)
    run_folder.validation_split.unlink()
    with pytest.raises(UserError, match="has no held-out samples"):
        quantize.run(QuantizeConfig(source=FinishedRun(run=str(run_folder.path)), quality=gate))
    with pytest.raises(UsageError, match=r"--gate 0\.02 needs --run .*uf quality --gguf"):
        quantize.run(QuantizeConfig(gguf=str(tiny_ggufs["f16"]), output=str(tmp_path / "q"), quality=gate))
    assert [path.name for path in run_folder.gguf.iterdir()] == ["run-f16.gguf"]
    assert not (tmp_path / "q").exists()
    with pytest.raises(UsageError, match="--gate -1: above 0"):
        GateSettings(gate=-1)


def test_what_can_be_measured(run_folder, tiny_ggufs):
    data = DataSettings(dataset=str(HANDBOOK))
    model = ModelSettings(model="tiny")
    files = f"{tiny_ggufs['q8_0']},{tiny_ggufs['q4_0']}"
    with pytest.raises(UserError, match=r"tiny-q8_0\.gguf, tiny-q4_0\.gguf: a 16-bit file .* needed"):
        quality.run(QualityConfig(gguf=files, model=model, data=data))
    with pytest.raises(UserError, match=r"a 16-bit file .* and at least one other are needed"):
        quality.run(QualityConfig(source=FinishedRun(run=str(run_folder.path))))
    with pytest.raises(UsageError, match="Measure on what"):
        quality.run(QualityConfig(gguf=str(tiny_ggufs["f16"]), model=model))


def test_pages_hold_every_file_and_fetch_nothing():
    files = (
        FileQuality("f16", "/x/<m>-f16.gguf", "a" * 64, 16 * 2**30, quality_of("", 1, 0.0, 0.0).values, {}),
        *judge([quality_of("q8_0", 8 * 2**30, 2e-6, 1e-7), quality_of("q4_0", 4 * 2**30, 0.5, 0.1, -0.02)], "kl", 0.1),
    )
    shown = {"model": "m|x", "engine": "e", "source": "s", "answers": 4, "tokens": 99, "reference": "f16"}
    report = QualityReport(**shown, files=files, gate=0.1, picked="q8_0")
    page = html_page(report)
    assert "http" not in page
    assert "&lt;m&gt;-f16.gguf" in page
    assert page.count("<circle") == 4  # two files in two plots
    assert "gate 0.1" in page
    assert "Picked q8_0: the smallest file with a mean KL divergence of at most 0.1" in page
    text = markdown_page(report)
    assert "| q8_0 * | 8,192.0 | 0.00±0.00 | 0.00±0.00 | 2e-06±1e-07 |" in text
    assert "| q4_0 | 4,096.0 |" in text
    assert quality_table(report).row_count == 3
    assert "gate" not in markdown_page(QualityReport(**shown, files=files)).split("## Files")[0].replace(
        "aggregate", ""
    )


def test_quality_is_a_stage_of_a_plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "model: tiny\nstages:\n  - sft: {dataset: x.jsonl}\n  - merge\n  - gguf\n"
        "  - quantize: {types: q8_0, gate: 0.02}\n"
        "  - quality: {gate: 0.01, gate_measure: perplexity}\n  - deploy\n",
        encoding="utf-8",
    )
    _, stages = plan.read_plan(path, str(tmp_path / "out"))
    assert [stage.command for stage in stages][-3:] == ["quantize", "quality", "deploy"]
    assert stages[3].config.quality.gate == 0.02
    assert stages[4].config.quality.gate_measure == "perplexity"
    assert "quality" in plan.READS["deploy"]
