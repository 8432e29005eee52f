"""Small own chat templates in the style of the families that users bring."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest

TEMPLATES = {
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
        "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
    "deepseek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
    "qwen25": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
TOKENS = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "mistral": ("<s>", "</s>", []),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ["<｜User｜>", "<｜Assistant｜>"]),
    "qwen25": (None, "<|im_end|>", []),
    "qwen3": (None, "<|im_end|>", []),
}


@pytest.fixture(scope="session")
def tokenizer(random_model_dir):
    """The fixture tokenizer with Qwen3's template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(random_model_dir)


@pytest.fixture(scope="session")
def tokenizer_of(tokenizer) -> Callable:
    """A copy of the fixture tokenizer with one family's control tokens and template."""

    def make(family: str):
        own = copy.deepcopy(tokenizer)
        bos, eos, further = TOKENS[family]
        special = {"eos_token": eos, "additional_special_tokens": further}
        own.add_special_tokens(special | ({"bos_token": bos} if bos else {}))
        own.chat_template = TEMPLATES.get(family, tokenizer.chat_template)
        return own

    return make


@pytest.fixture(scope="session")
def template_of(tokenizer_of) -> Callable:
    """ChatTemplate of one family, made once."""
    from unsloth_factory.data.template import ChatTemplate

    made: dict[str, ChatTemplate] = {}

    def get(family: str) -> ChatTemplate:
        if family not in made:
            made[family] = ChatTemplate.from_tokenizer(tokenizer_of(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def real_qwen3(shared_data):
    """ChatTemplate of the real Qwen2 vocabulary with Qwen3's added tokens and template."""
    import json

    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    from unsloth_factory.data.template import ChatTemplate

    own = AutoTokenizer.from_pretrained(shared_data / "qwen2-tokenizer")
    extras = shared_data / "qwen3-tokenizer-extras"
    for token in json.loads((extras / "added_tokens.json").read_text(encoding="utf-8")):
        added = AddedToken(token["content"], special=token["special"], normalized=False)
        own.add_tokens([added], special_tokens=token["special"])
    own.chat_template = next(extras.glob("*.jinja")).read_text(encoding="utf-8")
    return ChatTemplate.from_tokenizer(own, eos_ids=[151645, 151643])
