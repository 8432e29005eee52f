"""Security rows about code: pickles, versions, remote code, shells, templates, YAML, what a model writes."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.config.table import COMMANDS
from unsloth_factory.config.yaml_file import read_yaml
from unsloth_factory.data import template_sandbox
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.evaluation.choice.benchmark import load_benchmark
from unsloth_factory.export.converter import find_converter
from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.export.merge import MergeOptions, merge
from unsloth_factory.inference.child import ChildProcess
from unsloth_factory.knowledge import PackError, load_pack
from unsloth_factory.model import foreign_code, paths
from unsloth_factory.model.fingerprint import check_adapter_folder
from unsloth_factory.model.load import load_model
from unsloth_factory.model.standard import load_tokenizer
from unsloth_factory.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("unsloth_factory", "scripts", "benchmarks") for path in (ROOT / name).rglob("*.py"))
SERIALISERS = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle", "hickle"}
CALLS = {
    "torch.load", "torch.save", "eval", "exec", "os.system", "os.popen", "__import__", "pandas.read_pickle",
    "pd.read_pickle", "torch.jit.load", "torch.package.PackageImporter", "yaml.unsafe_load", "yaml.full_load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive", "tempfile.mktemp",
}  # fmt: skip
METHODS = {"extractall", "unpack_archive"}
TRUE_NEVER = {"trust_remote_code", "shell", "allow_pickle", "use_pickle"}


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """The whole syntax tree of a file."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


@functools.cache
def calls(path: Path) -> list[tuple[ast.Call, str]]:
    """Every call of a file with the text of what is called."""
    return [(node, ast.unparse(node.func)) for node in nodes(path) if isinstance(node, ast.Call)]


def uf(*arguments: object):
    from command_line import uf as run  # beside the tests of the command line

    return run(*arguments)


def edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(value | changes), encoding="utf-8")


def test_security_pickle_is_not_in_the_sources():
    """Nothing here can read a pickle, run a text as code, start a shell or unpack an archive."""
    assert len(SOURCES) > 100
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = {alias.name.split(".")[0] for alias in node.names} | {str(getattr(node, "module", ""))}
                assert not modules & SERIALISERS, f"{path}:{node.lineno}"
        for call, name in calls(path):
            where = f"{path}:{call.lineno}: {name}"
            assert name not in CALLS, where
            assert name.split(".")[-1] not in METHODS, where
            for keyword in call.keywords:
                true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in TRUE_NEVER and true), f"{where}({keyword.arg}=True)"
            if name in ("np.load", "numpy.load"):
                assert all(keyword.arg != "allow_pickle" for keyword in call.keywords), where


def test_security_pickle_beside_the_weights_is_never_opened(exported):
    """The base's folder holds five pickles and five modules that leave a mark; the whole chain ran over them."""
    assert (exported.base / "pytorch_model.bin").is_file()
    assert (exported.gguf.is_file(), exported.quantized.is_file()) == (True, True)
    assert not exported.marker.exists()
    left = {path.suffix for path in exported.run.rglob("*") if path.is_file()}
    assert left <= {".safetensors", ".json", ".jsonl", ".yaml", ".jinja", ".md", ".png", ".gguf", ".html", ""}
    assert not [path for path in exported.run.rglob("*") if path.is_file() and path.read_bytes()[:1] == b"\x80"]


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".pkl"])
def test_security_pickle_weights_are_refused(exported, copy_of, suffix):
    base = copy_of(exported.base, "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").rename(base / f"pytorch_model{suffix}")
    with pytest.raises(UserError, match=r"has its weights in [\w.]+ only. Pickle files can run code when opened"):
        load_model(ModelSettings(model=str(base)))
    adapter = copy_of(exported.adapter, "adapter")
    (adapter / "adapter_model.safetensors").rename(adapter / f"adapter_model{suffix}")
    with pytest.raises(UserError, match="Adapters in pickle files .* are never read"):
        load_model(ModelSettings(model=str(exported.base), adapter=str(adapter)))
    assert not exported.marker.exists()


FLOORS = {"torch": "2.10", "transformers": "5.3", "jinja2": "3.1.6", "safetensors": "0.8"}


def test_security_version_floors():
    """weights_only is no boundary before torch 2.10, configs run code before transformers 5.3."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {Requirement(text).name.lower(): Requirement(text).specifier for text in project["dependencies"]}
    for name, floor in FLOORS.items():
        lowest = [Version(part.version) for part in required[name] if part.operator in (">=", "==", "~=")]
        assert lowest, f"{name} has no lower bound"
        assert max(lowest) >= Version(floor), f"{name} {required[name]} allows versions before {floor}"


def test_security_checkpoint_is_no_code(exported):
    """Random state, optimizer and weights are tensors in safetensors; everything else is JSON."""
    import torch
    from safetensors.torch import load_file

    folder = exported.run / "checkpoint-2"
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".safetensors", ".json", ""}
    state = load_file(folder / "rng.safetensors")["cpu"]
    assert (state.dtype, state.shape) == (torch.uint8, torch.get_rng_state().shape)
    assert json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"] == 2


def test_security_trust_remote_code_is_never_asked():
    """Every loader is told False in so many words: left out, transformers asks at the terminal."""
    found = 0
    for path in SOURCES:
        for call, name in calls(path):
            if not name.endswith(".from_pretrained") or name.split(".")[0] in ("PeftModel", "LoraConfig"):
                continue
            found += 1
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if path.name not in ("convert_child.py",) and "unsloth_factory" in path.parts:
                assert (said.get("trust_remote_code"), said.get("local_files_only")) == ("False", "True"), path
    assert found >= 8


CODE = {
    "auto_map": {"AutoConfig": "configuration_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil",
                 "AutoTokenizer": ["tokenization_evil.Evil", None]},
    "model_file": "modeling_evil.py",
    "custom_generate": "generate.py",
    "_attn_implementation_internal": "evil/kernel",
    "attn_implementation": "evil/kernel:attention",
    "trust_remote_code": True,
    "text_config": {"auto_map": {"AutoModel": "modeling_evil.Evil"}},
}  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", sorted(CODE))
def test_security_trust_remote_code_config_scan(exported, copy_of, tmp_path, key, file):
    base = copy_of(exported.base, "base")
    edit(base / file, **{key: CODE[key]})
    for call in (
        lambda: load_model(ModelSettings(model=str(base))),
        lambda: convert(base, tmp_path / "x.gguf", GgufOptions(check=False)),
    ):
        with pytest.raises(UserError, match=rf"{file} asks for Python code from outside .*\({list(_last(key))[0]}\)"):
            call()
    assert uf("merge", "--model", base, "--adapter", exported.adapter, "--output", tmp_path / "m").code == 1
    assert sorted(os.listdir(tmp_path)) == ["base"]
    assert not exported.marker.exists()


def _last(key: str) -> Iterator[str]:
    yield "auto_map" if key == "text_config" else key


def test_security_trust_remote_code_would_not_run_without_the_scan(exported, copy_of, monkeypatch, tmp_path):
    """The second line: the loaders themselves do not run the folder's modules."""
    base, foreign = copy_of(exported.base, "base"), copy_of(exported.adapter, "adapter")
    (foreign / "unsloth_factory.json").unlink()
    for module in (paths, foreign_code):
        monkeypatch.setattr(module, "refuse_code_in_folder", lambda _: None, raising=False)
    for file in ("config.json", "tokenizer_config.json"):
        edit(base / file, auto_map=CODE["auto_map"], custom_generate="generate.py", tokenizer_class="Evil")
    for call in (
        lambda: load_model(ModelSettings(model=str(base))),
        lambda: load_tokenizer(base),
        lambda: merge(base, foreign, tmp_path / "m", MergeOptions()),
    ):
        with contextlib.suppress(UserError):
            call()
    assert not exported.marker.exists()


def test_security_trust_remote_code_of_the_converter(exported, copy_of):
    """llama.cpp's converter asks for remote code 14 times; in our child the answer is no, whatever it asks.

    DreamModel is one of the architectures for which it does; without our guard this folder's module runs.
    """
    from safetensors.torch import load_file, save_file

    base = copy_of(exported.base, "base")
    edit(base / "config.json", architectures=["DreamModel"])
    edit(base / "tokenizer_config.json", auto_map=CODE["auto_map"], tokenizer_class="Evil")
    kept = {name: tensor for name, tensor in load_file(base / "model.safetensors").items() if "_norm" not in name[-14:]}
    save_file(kept, base / "model.safetensors", metadata={"format": "pt"})  # Dream has no norms of queries and keys
    folder, _ = find_converter(None)
    request = {"op": "open", "converter": str(folder), "model": str(base), "byte_level_bpe": False}
    with ChildProcess("unsloth_factory.export.convert_child", "the converter") as child:
        assert child.call(request, timeout=120)[0]["architecture"] == "DreamModel"
        target = {"op": "convert", "outfile": str(base / "x.gguf"), "outtype": "f16", "name": "x"}
        with pytest.raises(UserError, match="the converter: NotImplementedError: BPE pre-tokenizer"):
            child.call(target, timeout=120)  # it came as far as the tokenizer, which is the plain one
    assert not exported.marker.exists()


@pytest.mark.parametrize("kind", ["lightglue", "superglue", "no_such_model"])
def test_security_only_language_models(exported, copy_of, kind):
    """transformers' other architectures load what their config names (CVE-2026-5241)."""
    base = copy_of(exported.base, "base")
    edit(base / "config.json", model_type=kind)
    for call in (lambda: load_model(ModelSettings(model=str(base))), lambda: foreign_code.load_config(base)):
        with pytest.raises(UserError, match=f"model_type '{kind}' is no causal language model"):
            call()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("megatron_config", {"a": 1}, "makes peft import a module"),
        ("auto_map", {"AutoModel": "evil.Evil"}, "asks for Python code"),
        ("target_modules", "(a+)+$", "repeats a group"),
        ("alpha_pattern", {"(.*)*x": 1}, "repeats a group"),
        ("rank_pattern", {"[": 1}, "no pattern"),
    ],
)
def test_security_adapter_config(exported, copy_of, key, value, message):
    """An adapter's config that asks for Python code, or holds a pattern that hangs the matcher, is refused at once."""
    adapter = copy_of(exported.adapter, "adapter")
    edit(adapter / "adapter_config.json", **{key: value})
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        check_adapter_folder(adapter)
    assert time.monotonic() - started < 1


def test_security_command_injection(exported):
    """The run is called `; touch pwned $(touch pwned) ...`; every command ran in it, and nothing was touched."""
    assert exported.run.is_dir()
    assert not list(exported.home.rglob("pwned*"))
    for path in SOURCES:
        for call, name in calls(path):
            if name in ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_output"):
                first = call.args[0] if call.args else None
                assert isinstance(first, ast.List | ast.Name | ast.Starred), f"{path}:{call.lineno}: no list of words"


def test_security_command_injection_in_what_is_printed(exported, tmp_path):
    """The lines that deploy and training print can be pasted into a shell."""
    ollama = tmp_path / "ollama"
    ollama.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    ollama.chmod(0o755)
    line = next(line for line in exported.outcomes["deploy"].out.splitlines() if "ollama create" in line)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["create", "x", "-f", str(exported.run / "Modelfile")]
    assert os.listdir(tmp_path) == ["ollama"]


BOMBS = {
    "a wide number": "{{ '%1000000000d' % 1 }}",
    "a repeated text": "{{ 'a' * 10**10 }}",
    "two loops, from the third turn on": "{{ '<|im_end|>' }}{% if messages|length > 2 %}{% for x in range(99999) %}"
    "{% for y in range(99999) %}{% endfor %}{% endfor %}{% endif %}",
}  # fmt: skip


def rendered_later(base: Path) -> str:
    """A prompt of three turns by the folder's template; its check at the start sees two at most."""
    template = ChatTemplate.from_tokenizer(load_tokenizer(base))
    return template.render_prompt((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))


@pytest.mark.parametrize("kind", sorted(BOMBS))
def test_security_jinja_bombs(exported, copy_of, monkeypatch, kind):
    """A hostile chat_template.jinja is stopped within its time and memory, once, and the command says so."""
    import psutil

    monkeypatch.setattr(template_sandbox, "SECONDS", 1.0)
    template_sandbox.sandbox().close()  # the limits of the next child
    base = copy_of(exported.base, "base")
    (base / "chat_template.jinja").write_text(BOMBS[kind])
    before, started = psutil.Process().memory_info().rss, time.monotonic()
    for _ in range(20):
        with pytest.raises(UserError, match="chat template (took longer than|needs more than|ended its).*was stopped"):
            rendered_later(base)
    assert time.monotonic() - started < 25  # one start of the child and one second, not twenty
    assert psutil.Process().memory_info().rss - before < 2**28
    template_sandbox.sandbox().close()


def test_security_jinja_child_renders_the_same(exported):
    """Unknown templates are rendered in the child, known ones here; the text is the same."""
    tokenizer = load_tokenizer(exported.base)
    known = tokenizer.chat_template
    unknown = known + "{# another text #}"
    messages = [
        {"role": "user", "content": "你好 \ud83d {{ 1 + 1 }} <b>&"},
        {"role": "assistant", "content": "a\u2028b"},
    ]
    for switches in ({}, {"add_generation_prompt": True, "enable_thinking": False}):
        assert template_sandbox.render(tokenizer, unknown, messages, switches) == tokenizer.apply_chat_template(
            messages, chat_template=known, tokenize=False, **switches
        )
    assert template_sandbox._is_known(known)
    assert not template_sandbox._is_known(unknown)
    process = template_sandbox.sandbox()._process
    assert process is not None
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    space = next(line for line in limits.splitlines() if line.startswith("Max address space"))
    assert int(space.split()[3]) < 8 * 2**30
    with open(f"/proc/{process.pid}/environ", encoding="utf-8") as file:
        assert "TOKEN" not in file.read().replace("TOKENIZERS", "")


TAG = "!!python/object/apply:os.mkdir ['{marker}']"
PLACES = {
    "settings": lambda path: read_yaml(path),
    "pack": lambda path: load_pack(str(path)),
    "benchmark": lambda path: load_benchmark(str(path)),
    "run": lambda path: RunFolder(path.parent).read(),
}


@pytest.mark.parametrize("place", sorted(PLACES))
@pytest.mark.parametrize("content", ["name: " + TAG, TAG, "command: " + TAG], ids=["value", "document", "command"])
def test_security_yaml(tmp_path, place, content):
    """No tag makes an object, and no file is read that is larger than such files are."""
    marker = tmp_path / "marker"
    path = tmp_path / "run.yaml"
    path.write_text(content.format(marker=marker))
    with pytest.raises((UserError, UsageError, PackError)):
        PLACES[place](path)
    assert not marker.exists()
    path.write_text("name: x\n" + "#" * (5 << 20))
    with pytest.raises((UserError, UsageError, PackError), match="bytes"):
        PLACES[place](path)


def test_security_yaml_loaders():
    for path in SOURCES:
        for call, name in calls(path):
            if name in ("yaml.load", "yaml.load_all"):
                loader = next(ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "Loader")
                classes = [node for node in nodes(path) if isinstance(node, ast.ClassDef) and node.name == loader]
                assert [ast.unparse(base) for base in classes[0].bases] == ["yaml.SafeLoader"], path


def test_security_code_that_a_model_wrote_is_never_run():
    """No reward and no task runs an answer; the day a command could, this test asks for its row."""
    assert not {"grpo", "rlvr", "humaneval"} & set(COMMANDS)
    assert shutil.which(sys.executable)
    for path in SOURCES:
        for call, name in calls(path):
            assert name not in ("compile", "builtins.eval", "builtins.exec", "runpy.run_path"), f"{path}:{call.lineno}"
