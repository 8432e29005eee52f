"""chat and validate with GGUF files; llama.cpp itself is replaced by a stand-in that answers from a list."""

from __future__ import annotations

import hashlib
import io
import json
from types import SimpleNamespace

import pytest

from unsloth_factory.commands import chat, validate
from unsloth_factory.commands.summary import collect
from unsloth_factory.config.commands import ChatConfig, ValidateConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, FinishedRun, GenerationSettings, ModelSettings
from unsloth_factory.evaluation.validation import validate as evaluation
from unsloth_factory.export.sums import write_folder_sums
from unsloth_factory.inference.generate import Generation
from unsloth_factory.run.folder import RunFolder, RunManifest


@pytest.fixture
def served(random_model_dir, tmp_path, monkeypatch):
    """(run folder of a fully tuned model with two GGUF files, the stand-in for llama.cpp)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model_dir)
    folder = RunFolder(tmp_path / "run")
    folder.write(
        RunManifest(command="sft", model="x", base_fingerprint="", finetuning_type="full", thinking="off", system="S")
    )
    folder.final_model.symlink_to(random_model_dir)
    folder.gguf.mkdir()
    (folder.gguf / "run-q8_0.gguf").write_bytes(b"8")
    (folder.gguf / "run-f16.gguf").write_bytes(b"16")

    class FakeLlama:
        """Says 好的。 and stops, the quantised file something else; one token a call where asked so."""

        max_positions = 1000
        other_tokenizer = False

        def __init__(self, path):
            self.path = path
            text = "好的。" if "f16" in path.name else "不知道"
            self.answer = tokenizer.encode(text, add_special_tokens=False)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.closed = True

        def tokenize(self, text):
            return [1] if self.other_tokenizer else tokenizer.encode(text, add_special_tokens=False)

        def generate(self, ids, max_new_tokens, stop_ids, **sampling):
            assert tokenizer.eos_token_id in stop_ids
            done = next((n for n in range(len(self.answer), 0, -1) if ids[-n:] == self.answer[:n]), 0)
            rest = self.answer[done : done + max_new_tokens]
            return Generation(rest, stopped=len(rest) < max_new_tokens)

    header = SimpleNamespace(metadata={"general.architecture": "qwen3", "qwen3.context_length": 1000})
    monkeypatch.setattr(validate, "read_header", lambda path: header)
    for module in (chat, evaluation):
        monkeypatch.setattr(module, "LlamaCpp", FakeLlama)
    return folder, FakeLlama


def test_chat_with_a_gguf_of_a_run_takes_template_and_tokenizer_from_the_run(served, monkeypatch, capsys):
    folder, _ = served
    monkeypatch.setattr("sys.stdin", io.StringIO("你好\n再说\n"))
    assert chat.run(ChatConfig(gguf=str(folder.gguf / "run-f16.gguf"))) == 0
    assert capsys.readouterr().out == "好的。\n好的。\n"


def test_a_gguf_of_another_model_is_refused(served, monkeypatch):
    folder, llama = served
    monkeypatch.setattr(llama, "other_tokenizer", True)
    with pytest.raises(UserError, match=r"run-f16\.gguf splits text into other tokens than .*final_model"):
        chat.run(ChatConfig(gguf=str(folder.gguf / "run-f16.gguf")))


def test_validate_scores_every_gguf_of_the_run(served, tmp_path):
    folder, _ = served
    (tmp_path / "qa.jsonl").write_text('{"question": "行吗？", "answer": "好的！"}\n', encoding="utf-8")
    config = ValidateConfig(
        source=FinishedRun(run=str(folder.path)),
        gguf="all",
        data=DataSettings(dataset=str(tmp_path / "qa.jsonl")),
        generation=GenerationSettings(max_new_tokens=20),
    )
    assert validate.run(config) == 0
    report = json.loads((folder.validation_results / "gguf.json").read_text(encoding="utf-8"))
    assert list(report["metrics"]) == ["f16", "q8_0"]
    assert [metrics["exact match"]["value"] for metrics in report["metrics"].values()] == [1.0, 0.0]
    assert report["model"]["engine"] == "llama.cpp"
    assert report["model"]["gguf"]["q8_0"]["sha256"] == hashlib.sha256(b"8").hexdigest()
    assert not (folder.validation_results / "validation.json").exists()
    # A file that is made anew keeps no score of the one before it.
    write_folder_sums(folder.gguf, ["run-q8_0.gguf", "run-f16.gguf"])
    assert collect(folder)["quantized"]["q8_0"]["accuracy"] == 0.0
    (folder.gguf / "run-q8_0.gguf").write_bytes(b"other")
    write_folder_sums(folder.gguf, ["run-q8_0.gguf"])
    summary = collect(folder)
    assert summary["quantized"]["q8_0"]["accuracy"] is None
    assert summary["f16_accuracy"] == 1.0


def test_gguf_all_needs_files(served, random_model_dir):
    folder, _ = served
    data = DataSettings(dataset=str(folder.path / "q.jsonl"))
    (folder.path / "q.jsonl").write_text('{"question": "q", "answer": "a"}\n', encoding="utf-8")
    for path in folder.gguf.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="has no GGUF file. Make one: uf gguf --run"):
        validate.run(ValidateConfig(source=FinishedRun(run=str(folder.path)), gguf="all", data=data))
    with pytest.raises(UsageError, match="--gguf all takes the files of a run folder"):
        validate.run(ValidateConfig(model=ModelSettings(model=str(random_model_dir)), gguf="all", data=data))
