"""Conversations as text segments with loss weights: what Qwen3's chat template renders, without Jinja.

Rendering a million conversations through Jinja takes minutes; a test holds this module to the template's output.
Each segment is tokenised on its own; segments meet only where the tokenizer splits anyway.
"""

from __future__ import annotations

from dataclasses import dataclass

Segment = tuple[str, float]
PROMPT_WEIGHT = 0.1
EMPTY_THINKING = "<think>\n\n</think>\n\n"


@dataclass(frozen=True)
class Dialogue:
    """(role, text) turns ending in the assistant's; `reasoning` belongs to the last turn (None: thinking is off)."""

    turns: tuple[tuple[str, str], ...]
    reasoning: str | None = None


def render_dialogue(dialogue: Dialogue) -> list[Segment]:
    """Segments of one training document; only the last answer (with its reasoning) has full weight."""
    *history, (role, answer) = dialogue.turns
    assert role == "assistant", "a dialogue ends in an answer"
    prompt = "".join(f"<|im_start|>{speaker}\n{text}<|im_end|>\n" for speaker, text in history)
    prompt += "<|im_start|>assistant\n"
    if dialogue.reasoning is None:
        return [(prompt + EMPTY_THINKING, PROMPT_WEIGHT), (answer + "<|im_end|>", 1.0)]
    thinking = f"<think>\n{dialogue.reasoning}\n</think>\n\n"
    return [(prompt, PROMPT_WEIGHT), (thinking + answer + "<|im_end|>", 1.0)]


def render_text(text: str) -> list[Segment]:
    """Segments of plain text."""
    return [(text + "<|endoftext|>", 1.0)]
