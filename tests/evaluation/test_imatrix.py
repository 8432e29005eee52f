"""`uf quantize --imatrix`: the matrix is made of the training text alone; programs are stand-ins or the real ones."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from unsloth_factory.commands import quantize
from unsloth_factory.config.commands import QuantizeConfig
from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import DataSettings, FinishedRun
from unsloth_factory.data.load import load_conversations
from unsloth_factory.data.training_data import training_data
from unsloth_factory.export.imatrix import PROGRAMS, make_imatrix
from unsloth_factory.export.quantize import parse_types
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.run.folder import RunFolder, RunManifest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "unsloth_factory" / "assets" / "demo" / "handbook_train.jsonl"
IMATRIX = """#!{python}
import json, pathlib, sys
given = sys.argv[1:]
text = pathlib.Path(given[given.index("-f") + 1]).read_text(encoding="utf-8")
pathlib.Path({folder!r}, "seen.json").write_text(json.dumps([given, text]))
pathlib.Path(given[given.index("-o") + 1]).write_bytes(b"matrix")
"""
QUANTIZE = """#!{python}
import pathlib, sys
import cyllama.llama.llama_cpp as cy
flag, matrix, source, target, name, threads = sys.argv[1:]
assert (flag, name) == ("--imatrix", "Q4_0") and pathlib.Path(matrix).read_bytes() == b"matrix"
params = cy.LlamaModelQuantizeParams()
params.ftype, params.nthread = 2, int(threads)
cy.model_quantize(source, target, params)
"""
FAILING = "#!/bin/sh\necho one; echo 'error: the model is not there' >&2; exit 3\n"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text.replace("{python}", sys.executable).replace("{folder!r}", repr(str(folder))))
    (folder / name).chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A folder, alone on the PATH, with stand-ins of both programs."""
    folder = tmp_path / "bin"
    program(folder, "llama-imatrix", IMATRIX)
    program(folder, "llama-quantize", QUANTIZE)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    return folder


@pytest.fixture
def run_folder(tiny_model_dir, tiny_ggufs, tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    data = DataSettings(dataset=f"{TRAIN}#200", val_split=0.2)
    manifest = RunManifest(
        command="sft", model="tiny", base_fingerprint="", finetuning_type="full", config={"data": asdict(data)}
    )
    folder.write(manifest)
    folder.final_model.symlink_to(tiny_model_dir)
    folder.gguf.mkdir()
    shutil.copy(tiny_ggufs["f16"], folder.gguf / "run-f16.gguf")
    return folder


def test_the_matrix_is_made_of_the_training_text_without_what_was_held_out(run_folder, programs, capsys):
    source = FinishedRun(run=str(run_folder.path))
    assert quantize.run(QuantizeConfig(source=source, types="q4_0", imatrix=True)) == 0
    given, text = json.loads((programs / "seen.json").read_text())
    assert given[given.index("-m") + 1] == str((run_folder.gguf / "run-f16.gguf").resolve())
    assert "--parse-special" in given
    data = DataSettings(dataset=f"{TRAIN}#200", val_split=0.2)
    trained, held_out, _ = training_data(data, load_conversations, seed=3407)
    assert len(held_out) == 40
    assert all(f"<|im_start|>user\n{item.turns[0].content}<|im_end|>" in text for item in trained)
    assert not any(f"<|im_start|>user\n{item.turns[0].content}<|im_end|>" in text for item in held_out)
    assert (run_folder.gguf / "imatrix" / "run-f16.gguf").read_bytes() == b"matrix"
    assert sorted(path.name for path in run_folder.gguf.glob("*.gguf")) == ["run-f16.gguf", "run-q4_0.gguf"]
    assert "Q4_0" in read_header(run_folder.gguf / "run-q4_0.gguf").type_counts()
    assert "importance matrix of" in capsys.readouterr().out
    assert sorted(path.name for path in (run_folder.gguf / "imatrix").iterdir()) == ["run-f16.gguf"]


def test_what_is_missing_is_said_before_anything_is_quantised(run_folder, programs, tiny_ggufs, tmp_path):
    run = FinishedRun(run=str(run_folder.path))
    with pytest.raises(UsageError, match="--imatrix needs --run of a training"):
        quantize.run(QuantizeConfig(gguf=str(tiny_ggufs["f16"]), output=str(tmp_path / "o"), imatrix=True))
    program(programs, "llama-imatrix", FAILING)
    with pytest.raises(UserError, match=r"llama-imatrix ended with exit code 3: one / error: the model is not there"):
        quantize.run(QuantizeConfig(source=run, imatrix=True))
    program(programs, "llama-imatrix", "#!/bin/sh\nexit 0\n")
    with pytest.raises(UserError, match="ended well but wrote no matrix"):
        quantize.run(QuantizeConfig(source=run, imatrix=True))
    assert list((run_folder.gguf / "imatrix").iterdir()) == []
    with pytest.raises(UserError, match=r"the training text has about 50 tokens; at least 73 are needed"):
        make_imatrix(tiny_ggufs["f16"], "x", 50, tmp_path / "m.gguf")
    (programs / "llama-quantize").unlink()
    with pytest.raises(UserError, match="--imatrix needs llama-quantize on the PATH"):
        quantize.run(QuantizeConfig(source=run, imatrix=True))
    assert [path.name for path in run_folder.gguf.glob("*.gguf")] == ["run-f16.gguf"]
    assert parse_types("iq2_xxs,q4_0", imatrix=True) == ["iq2_xxs", "q4_0"]
    with pytest.raises(UsageError, match="Add --imatrix"):
        parse_types("iq2_xxs")


@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="llama.cpp's programs are not on the PATH")
def test_the_real_programs_take_it_and_two_bits_work(run_folder):
    source = FinishedRun(run=str(run_folder.path))
    assert quantize.run(QuantizeConfig(source=source, types="iq2_xxs,q4_k_m", imatrix=True)) == 0
    header = read_header(run_folder.gguf / "run-iq2_xxs.gguf")
    assert "IQ2_XXS" in header.type_counts()
    assert header.metadata["quantize.imatrix.entries_count"] > 20
