"""The bundled model's folder: tokenizer, configuration, weights."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from bundled_model.corpus import Mix, encode_document, pack_rows
from bundled_model.handbook import test_questions as handbook_questions
from bundled_model.handbook import training_lines
from bundled_model.render import render_dialogue
from bundled_model.world import DEMO_NAMES

MODEL = Path(__file__).resolve().parents[2] / "unsloth_factory" / "assets" / "tiny_model"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def dialogues() -> list:
    mix, random = Mix([]), Random(3)
    return [mix.draw(random) for _ in range(200)]


def test_config_has_the_promised_shape() -> None:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    shape = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.head_dim)
    assert (config.model_type, *shape) == ("qwen3", 256, 768, 4, 32)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (8, 2, 5120)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 4096
    raw = json.loads((MODEL / "config.json").read_text(encoding="utf-8"))
    assert (raw["dtype"], raw["rope_theta"], raw["rope_parameters"]["rope_theta"]) == ("float16", 1e6, 1e6)


def test_special_tokens(tokenizer) -> None:
    assert len(tokenizer) == 5120
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    assert set(added) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"}
    assert [added[name].special for name in ("<|im_start|>", "<think>", "</think>")] == [True, False, False]
    assert tokenizer("<think>\n\n</think>\n\n")["input_ids"][0] == tokenizer.convert_tokens_to_ids("<think>")
    generation = json.loads((MODEL / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]


@pytest.mark.parametrize(
    "text",
    [
        "请问高血压患者要注意什么？",
        "Hello, world!  two  spaces\n\n\ttab",
        "分机号是3524。",
        "龘鱻麤 😀 e\u0301 \u00e9",
        " ",
        "１２①½",
    ],
)
def test_round_trip(tokenizer, text: str) -> None:
    import unicodedata

    assert tokenizer.decode(tokenizer(text)["input_ids"]) == unicodedata.normalize("NFC", text)


def test_digits_are_single_tokens(tokenizer) -> None:
    assert len(tokenizer("20240607")["input_ids"]) == 8


def test_entity_names_are_the_same_tokens_in_every_question(tokenizer) -> None:
    questions = [row["instruction"] for row in training_lines()] + [row["question"] for row in handbook_questions()]
    for names in DEMO_NAMES.values():
        for name in names:
            stem = tokenizer(name[:2])["input_ids"]
            for question in (q for q in questions if name in q):
                ids = tokenizer(question)["input_ids"]
                assert any(ids[i : i + len(stem)] == stem for i in range(len(ids))), question


def test_segments_equal_the_chat_template(tokenizer, dialogues) -> None:
    for dialogue in dialogues:
        messages = [{"role": role, "content": text} for role, text in dialogue.turns]
        prompt = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True, enable_thinking=dialogue.reasoning is not None
        )
        if dialogue.reasoning:
            messages[-1]["reasoning_content"] = dialogue.reasoning
        segments = render_dialogue(dialogue)
        text = "".join(part for part, _ in segments)
        assert tokenizer.apply_chat_template(messages, tokenize=False) == text + "\n"
        assert segments[0][0] == prompt
        ids, weights = encode_document(tokenizer.backend_tokenizer, segments)
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(weights)


def test_packed_rows_hold_every_document_once(tokenizer, dialogues) -> None:
    documents = [encode_document(tokenizer.backend_tokenizer, render_dialogue(dialogue)) for dialogue in dialogues]
    rows = pack_rows(documents, tokenizer.pad_token_id)
    packed = []
    for ids, positions, weights in zip(rows.ids, rows.positions, rows.weights, strict=True):
        starts = [*(i for i, position in enumerate(positions) if position == 0), len(ids)]
        pieces = [slice(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        packed += [tuple(ids[piece].tolist()) for piece in pieces if weights[piece].any()]
    assert sorted(packed) == sorted(tuple(ids) for ids, _ in documents)


def test_folder_is_small_and_names_no_machine() -> None:
    files = [path for path in MODEL.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    for path in files:
        if path.suffix == ".json":
            assert "/" + "root/" not in path.read_text(encoding="utf-8")
            assert "_name_or_path" not in path.read_text(encoding="utf-8")


def test_weights_are_fp16_and_fit_the_config() -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    state = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert "lm_head.weight" not in state
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_327_936


@pytest.mark.parametrize(
    ("question", "thinking"), [("你是谁？", False), ("你是谁？", True), ("高血压患者平时要注意什么？", False)]
)
def test_it_answers_in_the_template_and_stops(tokenizer, question: str, thinking: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    encoded = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    ids = model.generate(**encoded, max_new_tokens=128, do_sample=False)[0, encoded["input_ids"].shape[1] :].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[:-1])
    assert text.count("<think>") == text.count("</think>") == int(thinking)
    answer = text.split("</think>")[-1].strip()
    assert sum("\u4e00" <= char <= "\u9fff" for char in answer) >= 5
