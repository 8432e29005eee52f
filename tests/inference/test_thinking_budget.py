"""Thinking is closed when its budget is used up, and only then."""

from __future__ import annotations

import pytest

from unsloth_factory.config.settings import ModelSettings
from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.types import Turn
from unsloth_factory.inference.generate import generate
from unsloth_factory.inference.thinking import ThinkingBudget
from unsloth_factory.model.load import load_model

OPENS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(random_model_dir):
    return load_model(ModelSettings(model=str(random_model_dir)))


def prompts_of(template: ChatTemplate) -> list[list[int]]:
    return [template.encode_prompt((Turn("user", text),), True) for text in ("你好", "发热超过三天怎么办？", "Hello")]


def test_the_thinking_is_closed_and_the_answer_goes_on_behind_it(loaded):
    template = ChatTemplate(loaded.tokenizer, OPENS)
    prompts = prompts_of(template)
    budget = ThinkingBudget(6, template, True)
    free = generate(loaded, prompts, stop_ids=(), max_new_tokens=6)
    closing = budget.closing_ids
    assert loaded.tokenizer.decode(closing) == "\n</think>\n\n"
    assert closing[1] == loaded.tokenizer.convert_tokens_to_ids("</think>")
    forced = generate(loaded, prompts, stop_ids=(), max_new_tokens=5, thinking=budget, batch_size=2)
    for prompt, without, answer in zip(prompts, free, forced, strict=True):
        assert answer.ids[: 6 + len(closing)] == without.ids + closing
        later = generate(loaded, [[*prompt, *answer.ids[: 6 + len(closing)]]], stop_ids=(), max_new_tokens=5)[0]
        assert answer.ids[6 + len(closing) :] == later.ids
        reasoning, text, _ = template.decode_answer(answer.ids, True)
        assert reasoning == template.decode_answer(without.ids, True)[0]
        assert text == template.decode_answer([*closing, *later.ids], True)[1]


def test_an_answer_that_has_ended_its_thinking_or_itself_is_left_alone(loaded):
    template = ChatTemplate(loaded.tokenizer, OPENS)
    prompts = prompts_of(template)
    budget = ThinkingBudget(8, template, True)
    free = generate(loaded, prompts, stop_ids=(), max_new_tokens=8)
    stop = free[1].ids[3]
    ended = generate(loaded, prompts[1:2], stop_ids=(stop,), max_new_tokens=4, thinking=budget)[0]
    assert (ended.ids, ended.stopped) == (free[1].ids[: free[1].ids.index(stop)], True)
    mark = loaded.tokenizer.convert_tokens_to_ids("</think>")
    assert budget.is_thinking(free[0].ids)
    assert not budget.is_thinking([*free[0].ids[:4], mark, *free[0].ids[4:]])
    assert not budget.is_thinking([*free[0].ids[:4], mark])
    # A template that does not open the block, and a model that does not either: all is answer.
    plain = ChatTemplate.from_tokenizer(loaded.tokenizer)
    unopened = ThinkingBudget(8, plain, True)
    assert unopened.is_thinking([loaded.tokenizer.convert_tokens_to_ids("<think>"), *free[0].ids])
    assert not unopened.is_thinking(free[0].ids)
    asked = prompts_of(plain)[:1]
    whole = generate(loaded, asked, stop_ids=(), max_new_tokens=8 + len(unopened.closing_ids) + 4)[0]
    assert generate(loaded, asked, stop_ids=(), max_new_tokens=4, thinking=unopened)[0] == whole
