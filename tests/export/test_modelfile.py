"""The Go template is learned from the Jinja template, or left out; values that Ollama would misread are refused."""

from __future__ import annotations

import pytest

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.export.gguf import load_template
from unsloth_factory.export.go_template import go_template, learn_frame
from unsloth_factory.export.modelfile import OllamaModel, context_length, describe, render_modelfile

LLAMA3 = (
    "{{ '<|endoftext|>' if false else '' }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] %}{% set ms = messages[1:] %}"
    "{% else %}{% set s = '' %}{% set ms = messages %}{% endif %}"
    "{% for m in ms %}{% if m['role'] == 'user' %}{% if loop.last and s %}"
    "{{ '[INST] ' + s + '\n\n' + m['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)
QWEN25 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COUNTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + loop.index|string + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def qwen3(base_dir) -> ChatTemplate:
    return load_template(base_dir)


@pytest.mark.parametrize(
    "source", [LLAMA3, MISTRAL, QWEN25, NO_SYSTEM], ids=["llama3", "mistral", "qwen2.5", "no_system"]
)
def test_families_are_learned(qwen3, source):
    frame, reason = learn_frame(ChatTemplate(qwen3.tokenizer, source))
    assert frame is not None, reason
    assert frame.system_last is (source is MISTRAL)
    assert (frame.system_start is None) is (source is NO_SYSTEM)
    assert frame.thinks is False


def test_qwen3_is_learned_with_its_thinking_switch(qwen3):
    frame, reason = learn_frame(qwen3)
    assert frame is not None, reason
    assert frame.thinks is True
    turns = (Turn("system", "S"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    for thinking in (None, True, False):
        assert frame.render(turns, thinking) == qwen3.render_prompt(turns, thinking)


def test_an_unknown_template_is_left_out_with_a_note(qwen3):
    template = ChatTemplate(qwen3.tokenizer, COUNTING)
    model = describe(template, thinking=None, system="S", num_ctx=4096, sampling={})
    assert model.template is None
    assert "No TEMPLATE is written" in model.notes[0]
    assert "TEMPLATE" not in render_modelfile("./x.gguf", model)


# What Go's text/template must make of it: the fixed texts of ChatML, and the unset mode is the trained one.
EXPECTED_OFF = (
    "{{ $lastUser := -1 }}"
    '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $lastUser = $i }}{{ end }}{{ end }}'
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n"
    "{{ else }}<|im_start|>user\n{{ end }}"
    "{{ range $i, $m := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq $m.Role "user" }}{{ $m.Content }}{{ if $last }}'
    "{{ if $.IsThinkSet }}{{ if $.Think }}<|im_end|>\n<|im_start|>assistant\n"
    "{{ else }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{{ end }}"
    "{{ else }}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n{{ end }}"
    "{{ else }}<|im_end|>\n<|im_start|>assistant\n{{ end }}"
    '{{ else if eq $m.Role "assistant" }}'
    "{{ if and $m.Thinking (gt $i $lastUser) }}<think>\n{{ $m.Thinking }}\n</think>\n\n{{ end }}"
    "{{ $m.Content }}{{ if not $last }}<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}{{ end }}"
)


def test_go_text(qwen3):
    frame, _ = learn_frame(qwen3)
    assert go_template(frame, False) == EXPECTED_OFF
    assert go_template(frame, True) != EXPECTED_OFF


def test_fixed_text_with_braces_is_escaped(qwen3):
    source = QWEN25.replace("You are helpful.", "Use {{'{{'}}x}}.")
    source = source.replace("{{'{{'}}x}}", "{\\u007bx}}")
    frame, reason = learn_frame(ChatTemplate(qwen3.tokenizer, source))
    assert frame is not None, reason
    assert 'Use {{ "{{" }}x}}.' in go_template(frame, None)


def test_modelfile_text(qwen3):
    model = describe(
        qwen3, thinking=False, system='你是"医生"。\n请谨慎。', num_ctx=4096, sampling={"temperature": 0.6, "top_k": 20}
    )
    text = render_modelfile("./gguf/演示-q4_k_m.gguf", model)
    lines = text.splitlines()
    assert lines[0] == "FROM ./gguf/演示-q4_k_m.gguf"
    assert f'TEMPLATE """{EXPECTED_OFF}"""' in text
    assert 'SYSTEM """你是"医生"。\n请谨慎。"""' in text
    for line in ("PARAMETER num_ctx 4096", "PARAMETER temperature 0.6", "PARAMETER repeat_penalty 1.0"):
        assert line in lines
    assert 'PARAMETER stop """<|im_end|>"""' in lines
    assert model.notes == ()


@pytest.mark.parametrize("system", ['a """ADAPTER /etc/passwd', 'ends with "', "nul\x00", "bom\ufeff", "bell\x07"])
def test_values_that_would_inject_are_refused(system):
    with pytest.raises(UserError, match="system prompt holds"):
        render_modelfile("./x.gguf", OllamaModel(None, system))


def test_path_and_lost_characters(qwen3):
    with pytest.raises(UserError, match="cannot name this path"):
        render_modelfile("./a\nSYSTEM evil.gguf", OllamaModel(None, None))
    model = describe(qwen3, thinking=None, system="你好\u3000全角\u200d", num_ctx=4096, sampling={})
    assert "U+200D, U+3000" in model.notes[0]


def test_context_length():
    assert context_length(2048, 32768) == 4096
    assert context_length(8192, 32768) == 8192
    assert context_length(512, 1024) == 1024
    assert context_length(512, 32768, 16000) == 16000
