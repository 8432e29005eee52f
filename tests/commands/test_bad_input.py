"""Wrong input through the command line: exit 1 or 2, one message that names the fault, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from command_line import SMALL, tree, uf, write_gbk
from safetensors.torch import load_file, save_file

from unsloth_factory.model.paths import TINY_FOLDER
from unsloth_factory.run.folder import RunFolder

Disk = namedtuple("Disk", "total used free")


def refused(folder: Path, *arguments: object, code: int, names: list[str], new: tuple[str, ...] = ()) -> None:
    """The command fails with a message that has all of `names`, and leaves `folder` as it was but for `new`."""
    before, entries = tree(folder), set(folder.rglob("*"))
    outcome = uf(*arguments)
    assert outcome.code == code, outcome.out + outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("uf: ")]
    assert len(messages) == 1, outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    for name in names:
        assert str(name) in outcome.err, outcome.err
    left = {path for path in set(folder.rglob("*")) - entries if path.name not in new}
    assert left == set(), left
    assert {k: v for k, v in tree(folder).items() if Path(k).name not in new} == {
        k: v for k, v in before.items() if Path(k).name not in new
    }


def sft(folder: Path, *flags: object, model: object = "tiny") -> list[object]:
    """An SFT into `folder`/out; later flags win."""
    base = ["sft", "--model", model, "--dataset", folder / "data.jsonl", "--output_dir", folder / "out"]
    return [*base, *SMALL, "--max_steps", 1, *flags]


@pytest.fixture
def home(tmp_path) -> Path:
    """A folder with a good data file."""
    folder = tmp_path / "我的 data"
    folder.mkdir()
    lines = [{"instruction": f"问题{i}", "output": f"回答{i}。"} for i in range(8)]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (folder / "data.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (None, ["data.jsonl"]),
        (b"", ["data.jsonl", "empty"]),
        (b'{"instruction": "a", "output": "b"}\n{"instruction": "a", \n', ["data.jsonl", "2"]),
        (b'{"frage": "a", "antwort": "b"}\n', ["data.jsonl", "frage", "antwort", "--columns"]),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(200), ["data.jsonl"]),
        (b'{"instruction": "", "output": ""}\n', ["data.jsonl"]),
    ],
    ids=["missing", "empty", "broken line", "columns", "a picture", "only empty rows"],
)
@pytest.mark.parametrize("command", ["sft", "dpo", "validate"])
def test_bad_data(home, content, names, command):
    path = home / "data.jsonl"
    path.unlink() if content is None else path.write_bytes(content)
    if command == "validate":
        line = ["validate", "--model", "tiny", "--dataset", path, "--save_dir", home / "out"]
    else:
        line = [command, *sft(home)[1:]]
    if command == "dpo" and "--columns" in names:
        names = names[:3]
    refused(home, *line, code=1, names=names)


def test_wrong_flags(home):
    refused(home, *sft(home, "--epoch", 1), code=2, names=["--epoch", "epochs"])
    refused(home, *sft(home, "--domain", "dentistry"), code=2, names=["--domain dentistry", "medical"])
    refused(home, *sft(home, "--dataset_format", "alpacca"), code=2, names=["alpacca", "alpaca"])
    refused(home, *sft(home, "--epochs", "many"), code=2, names=["--epochs", "many"])
    refused(home, "sfft", code=2, names=["sfft", "sft"])
    refused(home, "sft", "--model", "tiny", code=2, names=["--dataset"])
    refused(home, *sft(home, "--resume", "auto", "--overwrite"), code=2, names=["--resume", "--overwrite"])
    line = ["evaluate", "--model", "tiny", "--task_dir", home, "--task", "ceval2"]
    refused(home, *line, code=2, names=["ceval2", "ceval"])


def test_bad_model_folders(home):
    base = home / "base"
    shutil.copytree(TINY_FOLDER, base)
    (base / "chat_template.jinja").unlink()
    refused(home, *sft(home, model=base), code=1, names=["chat template", "--chat_template"])
    assert uf(*sft(home, "--chat_template", "chatml", model=base)).code == 0
    shutil.rmtree(home / "out")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    refused(home, *sft(home, model=base), code=1, names=["model.safetensors"])
    weights.unlink()
    refused(home, *sft(home, model=base), code=1, names=[base, "safetensors"])
    (base / "pytorch_model.bin").write_bytes(b"x")
    refused(home, *sft(home, model=base), code=1, names=["pytorch_model.bin", "safetensors"])
    refused(home, *sft(home, model=home / "bse"), code=1, names=["bse", "Did you mean", "base"])
    refused(home, "validate", "--model", home / "no", "--dataset", home / "data.jsonl", code=1, names=["--model"])


def test_output_dir_that_is_taken(home, chain):
    refused(chain.folder, *sft(home, "--output_dir", chain.folder), code=1,
            names=[chain.folder, "--resume auto", "--overwrite"], new=(".lock",))  # fmt: skip
    refused(home, *sft(home, "--output_dir", home / "data.jsonl"), code=1, names=["--output_dir", "data.jsonl"])
    refused(home, *sft(home, "--output_dir", home / "data.jsonl/x"), code=1, names=["--output_dir", "data.jsonl"])
    with RunFolder(home / "held").lock():
        refused(
            home, *sft(home, "--output_dir", home / "held"), code=1, names=["held", "another training"], new=(".lock",)
        )


def test_the_system_refuses(home, chain, monkeypatch):
    def deny(path: object, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", deny)
        refused(home, *sft(home), code=1, names=["--output_dir", "Permission denied"])
    with monkeypatch.context() as patch:
        patch.setattr("unsloth_factory.commands.validate.load_conversations", lambda data, **_: deny(data.dataset))
        line = ["validate", "--model", "tiny", "--dataset", home / "data.jsonl"]
        refused(home, *line, code=1, names=["data.jsonl: Permission denied"])
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", deny)
        line = ["deploy", "--run", chain.folder, "--ollama_host", "127.0.0.1:9"]
        refused(chain.folder, *line, code=1, names=["Modelfile", "Permission denied"])


def test_everything_too_long(home):
    line = json.dumps({"instruction": "问", "output": "很长的回答。" * 60}, ensure_ascii=False)
    (home / "data.jsonl").write_text((line + "\n") * 4, encoding="utf-8")
    refused(home, *sft(home, "--max_seq_length", 64), code=1, names=["--max_seq_length", "64"])


def test_run_folders_that_are_none(home, run_copy):
    for command in ("validate", "chat", "merge", "gguf", "quantize", "deploy", "evaluate"):
        more = ["--task_dir", home] if command == "evaluate" else []
        if command == "evaluate":
            (home / "val").mkdir()
            (home / "val" / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,问,1,2,3,4,A\n", encoding="utf-8")
        refused(home, command, "--run", home, *more, code=1, names=["--run", home, "run.yaml"])
    unfinished = run_copy("final_adapter", "merged_model", "gguf", "checkpoint-*")
    for command in ("validate", "chat", "merge"):
        refused(unfinished, command, "--run", unfinished, code=1, names=["final_adapter", "--resume auto"])
    for command, next_step in (("gguf", "uf merge --run"), ("quantize", "uf gguf --run"), ("deploy", "uf gguf --run")):
        refused(unfinished, command, "--run", unfinished, code=1, names=[next_step])
    (unfinished / "run.yaml").write_text("command: [", encoding="utf-8")
    refused(unfinished, "validate", "--run", unfinished, code=1, names=["run.yaml"])


def test_adapters_that_do_not_fit(home, run_copy, random_model_dir):
    run = run_copy("checkpoint-*", "merged_model", "gguf")
    for command in ("merge", "validate"):
        names = [random_model_dir, "final_adapter"]
        refused(run, command, "--run", run, "--model", random_model_dir, code=1, names=names)
    (run / "final_adapter" / "SHA256SUMS").unlink()  # or the damage is seen before its kind is
    weights = run / "final_adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    poisoned = next(name for name in tensors if "lora_B" in name)
    save_file(tensors | {poisoned: torch.full_like(tensors[poisoned], torch.nan)}, weights)
    for command in ("merge", "validate", "chat"):
        refused(run, command, "--run", run, code=1, names=["NaN"])
    weights.write_bytes(weights.read_bytes()[:5000])
    for command in ("merge", "validate", "chat"):
        refused(run, command, "--run", run, code=1, names=["adapter_model.safetensors"])
    weights.unlink()
    for command in ("merge", "validate", "chat"):
        refused(run, command, "--run", run, code=1, names=["adapter_model.safetensors"])


def test_a_home_that_is_nobodys(home):
    refused(home, "merge", "--run", "~nosuchuser/x", code=1, names=["~NAME"])


def test_no_room(home, run_copy, monkeypatch):
    run = run_copy("checkpoint-*", "merged_model")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**9, 10**9, 10**5))
    for command in ("merge", "quantize"):
        refused(run, command, "--run", run, "--output", run / "new", code=1, names=["GiB", "free"])
    refused(home, *sft(home), code=1, names=["GiB", "free"], new=("out", ".lock", "data_report.json"))


def test_gguf_files(home, run_copy):
    run = run_copy("checkpoint-*", "merged_model")
    file = run / "gguf" / "医生 1-f16.gguf"
    refused(run, "quantize", "--run", run, "--types", "q4_k_m,q4_k_x", code=2, names=["q4_k_x", "q4_k_m"])
    refused(run, "quantize", "--gguf", run / "no.gguf", code=1, names=["no.gguf"])
    refused(run, "validate", "--run", run, "--gguf", run / "no.gguf", code=1, names=["no.gguf"])
    refused(run, "chat", "--gguf", home / "no.gguf", code=2, names=["no.gguf", "--run"])
    file.write_bytes(file.read_bytes()[:-5000])
    for command in (["quantize", "--types", "q8_0"], ["validate", "--gguf", file], ["chat", "--gguf", file]):
        refused(run, *command, "--run", run, code=1, names=[file.name])
    refused(run, "deploy", "--run", run, "--gguf", file, code=1, names=[file.name])


def test_paths_with_blanks_and_chinese_work(home):
    data = write_gbk(home / "病例 一.csv", 8)
    outcome = uf("sft", "--model", "tiny", "--dataset", data, "--output_dir", home / "输出 1", *SMALL, "--max_steps", 1)
    assert outcome.code == 0
    assert f"uf validate --run '{home / '输出 1'}'" in outcome.out
