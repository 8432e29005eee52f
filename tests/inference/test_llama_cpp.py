"""llama.cpp in a child: the same answers as transformers, named errors for damaged files, crashes that stay outside."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.export.gguf import GgufOptions, convert
from unsloth_factory.inference.child import ChildProcess
from unsloth_factory.inference.gguf_header import read_header
from unsloth_factory.inference.llama_cpp import LlamaCpp


@pytest.fixture(scope="module")
def gguf(random_model_dir, tmp_path_factory) -> Path:
    return convert(
        random_model_dir, tmp_path_factory.mktemp("g") / "r-f32.gguf", GgufOptions(outtype="f32", check=False)
    ).path


@pytest.fixture(scope="module")
def llama(gguf):
    with LlamaCpp(gguf) as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(random_model_dir):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(random_model_dir, dtype=torch.float32).eval()


def test_logits_and_last_logits(llama, reference):
    ids = [int(i) for i in np.random.default_rng(0).integers(0, 300, 300)]  # more than one chunk of 256
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    found = llama.logits(ids)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 0.02
    assert np.abs(llama.last_logits(ids) - expected[-1]).max() < 0.02


def test_greedy_equals_transformers_and_does_not_depend_on_what_came_before(llama, reference):
    prompts = [[5, 6, 7, 8], [5, 6, 7, 9, 10], [5, 6, 7, 8]]
    answers = [llama.generate(ids, 12) for ids in prompts]
    assert answers[0] == answers[2]
    for ids, answer in zip(prompts, answers, strict=True):
        out = reference.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert answer.ids == out[0, len(ids) :].tolist()
        assert answer.stopped is False


def test_stop_ids_streaming_and_sampling(llama):
    free = llama.generate([5, 6, 7], 8).ids
    seen: list[int] = []
    stopped = llama.generate([5, 6, 7], 8, stop_ids=[free[3]], on_token=seen.append)
    cut = free.index(free[3])
    assert stopped.stopped is True
    assert stopped.ids == seen == free[:cut]
    sampled = [llama.generate([5, 6, 7], 8, temperature=1.5, top_k=0, top_p=1.0, seed=seed).ids for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_tokenize_and_render(llama, random_model_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(random_model_dir)
    text = "高血压<|im_end|> hi 🦙"
    assert llama.tokenize(text) == tokenizer(text)["input_ids"]
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert control not in llama.tokenize(text, parse_special=False)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "你好"}]
    for thinking in (None, True, False):
        switch = {} if thinking is None else {"enable_thinking": thinking}
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **switch)
        assert llama.render(messages, thinking) == expected


def test_prompt_limits(llama):
    with pytest.raises(UserError, match="takes 1 to 1024"):
        llama.generate([], 5)
    with pytest.raises(UserError, match="a prompt of 1025 tokens"):
        llama.logits([1] * 1025)
    assert len(llama.generate([1] * 1020, 50).ids) == 4  # cut where the positions end
    with pytest.raises(UserError, match="llama.cpp with"):
        llama.generate([10**6], 5)  # an id outside the vocabulary
    assert llama.generate([5], 1).ids  # still alive


def test_speed_of_the_demo(llama):
    """120 questions of 60 tokens with 40-token answers: seconds, not minutes, for a model of this size."""
    start = time.monotonic()
    for i in range(120):
        llama.generate([*range(5, 60), i % 50], 40)
    assert time.monotonic() - start < 10


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 0, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: b"", "it has 0 bytes"),
        (lambda data: b"GGUF", "it has 4 bytes"),
        (lambda data: b"GGML" + data[4:], "it starts with"),
        (lambda data: b"GGUF" + struct.pack("<I", 99) + data[8:], "version 99"),
        (lambda data: data[:8] + struct.pack("<Q", 2**60) + data[16:], "announces 1152921504606846976 tensors"),
        (lambda data: data[:16] + struct.pack("<Q", 2**50) + data[24:], "metadata entries"),
        (lambda data: HEADER[:16] + struct.pack("<QQ", 1, 2**40) + b"k" * 40, "characters"),
        (lambda data: data[:200], "cut off|more than the file can hold"),
        (lambda data: data[: len(data) // 2], "over the end of the file"),
        (lambda data: data[:-4096], "over the end of the file"),
        (lambda data: data[:8] + b"\xff" * 16 + data[24:], "announces"),
    ],
)
def test_damaged_files_are_named_before_a_loader_sees_them(gguf, tmp_path, change, reason):
    path = tmp_path / "broken.gguf"
    path.write_bytes(change(gguf.read_bytes()))
    start = time.monotonic()
    with pytest.raises(UserError, match=f"broken.gguf is not an intact GGUF file: .*({reason})"):
        LlamaCpp(path)
    assert time.monotonic() - start < 2


def test_header_fuzz_never_raises_anything_else(gguf, tmp_path):
    data = gguf.read_bytes()
    random = np.random.default_rng(1)
    path = tmp_path / "f.gguf"
    bad = 0
    for _ in range(300):
        changed = bytearray(data[:20000])
        for at in random.integers(4, 600, 6):
            changed[at] = random.integers(0, 256)
        path.write_bytes(bytes(changed) + data[20000:])
        try:
            read_header(path)
        except UserError:
            bad += 1
    assert bad > 50


def test_nan_tensors_are_refused(gguf, tmp_path):
    header = read_header(gguf)
    data = bytearray(gguf.read_bytes())
    data[-header.tensors[-1].bytes :][:4]
    data[-4:] = struct.pack("<f", float("nan"))
    path = tmp_path / "nan.gguf"
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"llama.cpp with nan.gguf"):
        LlamaCpp(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="is missing"):
        LlamaCpp(tmp_path / "no.gguf")


def test_a_crash_is_an_error_with_the_signal_s_name(gguf):
    with LlamaCpp(gguf) as llama:
        os.kill(llama._decoder.pid, signal.SIGABRT)
        with pytest.raises(UserError, match="SIGABRT"):
            llama.generate([1, 2], 3)


CHILD = """
import os, sys, time
from unsloth_factory.inference.child import serve
def crash(request, send): print("native noise"); sys.stderr.write("last words\\n"); sys.stderr.flush(); os.abort()
def sleep(request, send): time.sleep(60)
def echo(request, send): print("noise"); send({"event": "x", "n": 1}); return {"got": request["text"]}, b"abc"
def fail(request, send): raise ValueError("bad value")
if __name__ == "__main__": serve({"crash": crash, "sleep": sleep, "echo": echo, "fail": fail})
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    (tmp_path / "toy_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with ChildProcess("toy_child", "the toy") as process:
        yield process


def test_child_protocol(child):
    events: list[dict] = []
    reply, raw = child.call({"op": "echo", "text": "你好\n🦙"}, timeout=20, on_event=events.append)
    assert reply["got"] == "你好\n🦙"
    assert raw == b"abc"
    assert events == [{"event": "x", "n": 1}]
    with pytest.raises(UserError, match="the toy: ValueError: bad value"):
        child.call({"op": "fail"}, timeout=20)
    assert child.call({"op": "echo", "text": "x"}, timeout=20)[0]["got"] == "x"


def test_child_crash_quotes_its_last_words(child):
    with pytest.raises(UserError, match=r"(?s)the toy: the process was killed by SIGABRT.*last words"):
        child.call({"op": "crash"}, timeout=20)


def test_child_timeout(child):
    child.call({"op": "echo", "text": "x"}, timeout=20)
    with pytest.raises(UserError, match="no answer in time"):
        child.call({"op": "sleep"}, timeout=0.3)


def test_child_is_found_from_any_folder(tmp_path, monkeypatch, gguf):
    """A file in the user's folder must not shadow a library in the child."""
    (tmp_path / "json.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    assert sys.path
    with LlamaCpp(gguf) as llama:
        assert llama.tokenize("hi")
