"""The four commands on a run folder, one after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from unsloth_factory.commands import deploy, gguf, merge, quantize
from unsloth_factory.config.commands import DeployConfig, GgufConfig, MergeConfig, QuantizeConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import FinishedRun
from unsloth_factory.model.fingerprint import fingerprint
from unsloth_factory.run.atomic import verify_sums
from unsloth_factory.run.folder import RunFolder, RunManifest


@pytest.fixture
def run_folder(base_dir, adapter_dir, tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "运行 1")
    folder.path.mkdir()
    shutil.copytree(adapter_dir, folder.final_adapter)
    shutil.copyfile(base_dir / "chat_template.jinja", folder.template)
    manifest = RunManifest(
        command="sft", model=str(base_dir), base_fingerprint=fingerprint(base_dir), thinking="off", system="你是医生。"
    )
    folder.write(manifest)
    turns = [{"role": "user", "content": "高血压?"}, {"role": "assistant", "content": "低盐。"}]
    line = json.dumps({"messages": turns, "source": "a:1"}) + "\n"
    folder.validation_split.write_text(line, encoding="utf-8")
    return folder


def test_run_to_modelfile(run_folder, capsys, monkeypatch):
    source = FinishedRun(run=str(run_folder.path))
    assert merge.run(MergeConfig(source=source)) == 0
    assert json.loads((run_folder.merged_model / "merge.json").read_text())["max_abs_logit_diff"] < 0.1
    assert gguf.run(GgufConfig(source=source)) == 0
    assert (run_folder.gguf / "运行 1-f16.gguf").is_file()
    assert quantize.run(QuantizeConfig(source=source, types="q8_0,q4_k_m")) == 0
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")  # nobody there
    assert deploy.run(DeployConfig(source=source)) == 0
    text = run_folder.modelfile.read_text(encoding="utf-8")
    assert text.startswith("FROM ./gguf/运行 1-q4_k_m.gguf\n")
    assert 'SYSTEM """你是医生。"""' in text
    assert "PARAMETER num_ctx 1024" in text  # the tiny model has no more positions
    out = capsys.readouterr().out
    commands = [line.strip() for line in out.splitlines() if line.strip().startswith("ollama ")]
    assert [command.split()[:2] for command in commands] == [["ollama", "create"], ["ollama", "run"]]
    assert commands[1].endswith("--think=false")
    for folder in (run_folder.path, run_folder.gguf, run_folder.merged_model):
        assert verify_sums(folder) == []


def test_commands_say_what_is_missing(run_folder, tmp_path):
    source = FinishedRun(run=str(run_folder.path))
    with pytest.raises(UserError, match="uf merge --run"):
        gguf.run(GgufConfig(source=source))
    with pytest.raises(UserError, match="uf gguf --run"):
        quantize.run(QuantizeConfig(source=source))
    with pytest.raises(UserError, match="uf gguf --run"):
        deploy.run(DeployConfig(source=source))
    for call in (
        lambda: merge.run(MergeConfig()),
        lambda: gguf.run(GgufConfig()),
        lambda: quantize.run(QuantizeConfig()),
        lambda: deploy.run(DeployConfig()),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(UsageError, match=r"ends in .gguf"):
        gguf.run(GgufConfig(model=str(tmp_path), output="x.bin"))


def test_full_training_has_nothing_to_merge(run_folder, merged_dir, capsys):
    manifest = run_folder.read()
    shutil.copytree(merged_dir, run_folder.final_model)
    run_folder.write(RunManifest(**{**manifest.__dict__, "finetuning_type": "full"}))
    assert merge.run(MergeConfig(source=FinishedRun(run=str(run_folder.path)))) == 0
    assert "nothing to merge" in capsys.readouterr().out
    assert (run_folder.merged_model / "model.safetensors").is_file()


def test_deploy_of_a_bare_file(gguf_result, tmp_path, monkeypatch, capsys):
    target = tmp_path / "demo-f16.gguf"
    shutil.copyfile(gguf_result.path, target)
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    assert deploy.run(DeployConfig(gguf=str(target), name="x")) == 0
    text = Path(tmp_path / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./demo-f16.gguf")
    assert "TEMPLATE" not in text
    assert "unknown here" in capsys.readouterr().out.replace("\n", " ")
