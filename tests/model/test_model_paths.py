from __future__ import annotations

import json
import shutil
import socket

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.model import paths
from unsloth_factory.model.paths import check_model_folder, is_hub_id, resolve_model


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(paths, "_from_hugging_face", refuse)
    monkeypatch.setattr(paths, "_from_modelscope", refuse)


def test_a_complete_folder_is_taken(random_model_dir):
    assert resolve_model(str(random_model_dir)) == random_model_dir


def test_tiny_is_the_bundled_folder(monkeypatch, random_model_dir, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "TINY_FOLDER", random_model_dir)
    assert resolve_model("tiny") == random_model_dir


def test_missing_model_flag():
    with pytest.raises(UserError, match="--model is missing"):
        resolve_model(None)


@pytest.mark.parametrize("name", ["./Qwen/Qwen3", "/nowhere/Qwen3", "models/qwen3/8b", "qwn3", "models/qwn3", "~/none"])
def test_what_could_be_a_path_never_reaches_the_network(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="no such folder"):
        resolve_model(name)


def test_near_names_are_offered(tmp_path, no_network):
    (tmp_path / "qwen3-8b").mkdir()
    with pytest.raises(UserError, match=r"Did you mean .*qwen3-8b\?"):
        resolve_model(str(tmp_path / "qwen3_8b"))


@pytest.mark.parametrize(
    ("name", "expected"), [("Qwen/Qwen3-8B", True), ("tiny", False), ("a/b/c", False), ("../x", False)]
)
def test_hub_ids(name, expected):
    assert is_hub_id(name) is expected


def test_hub_id_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(UserError, match="cannot be downloaded from Hugging Face"):
        resolve_model("no-such-org/no-such-model")


def test_modelscope_without_its_package(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install modelscope"):
        resolve_model("org/name", "modelscope")


def test_cached_hub_model_needs_no_download(monkeypatch, tmp_path, random_model_dir):
    import huggingface_hub

    def from_cache(_name, local_files_only=False, **_options):
        assert local_files_only, "a download was tried"
        return str(random_model_dir)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", from_cache)
    assert resolve_model("org/name") == random_model_dir


def test_path_too_long(tmp_path):
    with pytest.raises(UserError, match="too long"):
        resolve_model(str(tmp_path / ("x" * 5000)))


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="is a file"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_chinese_and_spaces_in_the_path(random_model_dir, tmp_path):
    folder = shutil.copytree(random_model_dir, tmp_path / "模型 8B 😀")
    assert resolve_model(str(folder)) == folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.X"}}, "auto_map"),
        ({"text_config": {"auto_map": {}}}, "auto_map"),
        ({"_attn_implementation_internal": "someone/kernel"}, "_attn_implementation_internal"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": None}, "model_type"),
    ],
)
def test_config_that_is_refused(copy_model, edit_json, changes, message):
    folder = copy_model()
    edit_json(folder / "config.json", **changes)
    with pytest.raises(UserError, match=message):
        check_model_folder(folder)


def test_tokenizer_code_is_refused(copy_model, edit_json):
    folder = copy_model()
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    with pytest.raises(UserError, match=r"tokenizer_config\.json asks for Python code"):
        check_model_folder(folder)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 50_000])
def test_broken_config(copy_model, text):
    folder = copy_model()
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json"):
        check_model_folder(folder)


def test_pickle_only_base_is_refused(copy_model):
    folder = copy_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin only.*safetensors version"):
        check_model_folder(folder)


@pytest.mark.parametrize(("name", "message"), [("config.json", "no config.json"), ("model.safetensors", "no weights")])
def test_missing_file(copy_model, name, message):
    folder = copy_model()
    (folder / name).unlink()
    with pytest.raises(UserError, match=message):
        check_model_folder(folder)


def test_missing_tokenizer(copy_model):
    folder = copy_model()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        check_model_folder(folder)


def test_adapter_given_as_model(copy_model):
    folder = copy_model()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="--adapter"):
        check_model_folder(folder)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_weights_cut_short(copy_model, keep):
    path = copy_model() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        check_model_folder(path.parent)


def test_index_with_a_missing_shard(copy_model):
    folder = copy_model()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="lacks 1 of the 2 weight files.*00002-of-00002"):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "weights.bin"])
def test_index_that_points_outside(copy_model, name):
    folder = copy_model()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="only plain"):
        check_model_folder(folder)
