"""The bundled model's tokenizer and configuration files (everything in its folder but the weights)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

from bundled_model.corpus import Mix
from bundled_model.relations import RELATIONS
from bundled_model.render import Dialogue
from bundled_model.world import NAME_FIRST, NAME_SECOND, NOT_MENTIONED, SUFFIXES, UNKNOWN, VALUES

VOCAB = 5120
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINKING = ("<think>", "</think>")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer, digit by digit: llama.cpp knows it under the name qwen2."""
ASCII_MERGES = 260
CHARACTERS = 3050
"""Non-ASCII characters that are one token each; what then is left of the vocabulary goes to two-character words."""


def training_texts(extra: list[Dialogue], drawn: int, seed: int = 5) -> Iterator[str]:
    """Texts to count characters and words in: extra text and drawn documents."""
    mix, random = Mix([]), Random(seed)
    for dialogue in [*extra, *(mix.draw(random) for _ in range(drawn))]:
        yield from (text for _, text in dialogue.turns)
        if dialogue.reasoning:
            yield dialogue.reasoning


def _level_one_characters() -> Iterator[str]:
    """GB 2312's 3,755 most common characters."""
    for row in range(0xB0, 0xD8):
        for cell in range(0xA1, 0xFF):
            try:
                yield bytes((row, cell)).decode("gb2312")
            except UnicodeDecodeError:
                continue


def _own_characters() -> Iterator[str]:
    """Every character that our own generator can write."""
    yield from NAME_FIRST + NAME_SECOND + UNKNOWN + NOT_MENTIONED
    for pool in (*VALUES.values(), *SUFFIXES.values()):
        yield from "".join(pool)
    for relations in RELATIONS.values():
        for relation in relations:
            yield from relation.answer + relation.topic + "".join(relation.frames)


def _pipeline(core) -> None:
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()


def _byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte, 0 to 255 (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _ascii_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Merges inside ASCII runs, by ordinary BPE training."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.BPE())
    _pipeline(core)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(alphabet) + ASCII_MERGES
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=alphabet)
    core.train_from_iterator((run for text in texts for run in re.findall(r"[ -~\n]+", text)), trainer)
    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def _is_word(pair: str) -> bool:
    """Two Chinese characters that cannot glue an entity's name to its surroundings."""
    chinese = all("\u4e00" <= char <= "\u9fff" for char in pair)
    return chinese and "的" not in pair and pair[1] not in NAME_FIRST and pair[0] not in NAME_SECOND


def _merges(texts: list[str]) -> Iterator[tuple[str, str]]:
    """ASCII merges, then whole characters, then two-character words by frequency.

    Plain BPE training on a small Chinese corpus makes tokens that end in half a character; this order cannot.
    """
    letters = _byte_letters()
    counts = Counter(char for text in texts for char in text if ord(char) > 127)
    words = Counter(pair for text in texts for pair in map("".join, pairwise(text)) if _is_word(pair))
    wanted = dict.fromkeys(char for char in _own_characters() if ord(char) > 127)
    wanted |= dict.fromkeys(char for char, count in counts.most_common() if count > 1)
    wanted |= dict.fromkeys(_level_one_characters())
    chosen = list(wanted)[:CHARACTERS]
    yield from _ascii_merges(texts)

    def spell(char: str) -> str:
        return "".join(letters[byte] for byte in char.encode())

    for char in chosen:
        spelled = spell(char)
        for end in range(1, len(spelled)):
            yield spelled[:end], spelled[end]
    known = set(chosen)
    for word, _ in words.most_common():
        if set(word) <= known:
            yield spell(word[0]), spell(word[1])
    for char in list(wanted)[CHARACTERS:]:  # too little text for words: more characters
        spelled = spell(char)
        for end in range(1, len(spelled)):
            yield spelled[:end], spelled[end]


def train_tokenizer(texts: Iterable[str]):
    """A byte-level BPE of exactly `VOCAB` tokens with ChatML's specials at the end of the vocabulary."""
    from tokenizers import AddedToken, Tokenizer, models

    vocabulary = {letter: index for index, letter in enumerate(sorted(_byte_letters()))}
    merges: list[tuple[str, str]] = []
    for left, right in _merges(list(texts)):
        if len(vocabulary) == VOCAB - len(SPECIAL) - len(THINKING):
            break
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    _pipeline(core)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINKING])
    assert core.get_vocab_size() == VOCAB, f"{core.get_vocab_size()} tokens instead of {VOCAB}: give more text"
    return core


def model_config(core) -> dict:
    """config.json: Qwen3's architecture with 4.33 million parameters."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,  # where transformers 4 looks for it
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": core.token_to_id("<|im_end|>"),
        "pad_token_id": core.token_to_id("<|endoftext|>"),
        "dtype": "float16",
    }


def _tokenizer_config(core) -> dict:
    tokens = {
        str(core.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL,
        }
        for token in (*SPECIAL, *THINKING)
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": tokens,
        "add_prefix_space": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "errors": "replace",
    }


def write_model_files(core, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json, config.json and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    end, pad = core.token_to_id("<|im_end|>"), core.token_to_id("<|endoftext|>")
    generation = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "eos_token_id": [end, pad],
        "pad_token_id": pad,
    }
    files = {"tokenizer_config": _tokenizer_config(core), "config": model_config(core), "generation_config": generation}
    for name, content in files.items():
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
