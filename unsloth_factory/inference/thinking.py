"""A limit to how long a model thinks: when it is used up the thinking is closed, and the model has to answer.

Closing the block in the model's place is the "budget forcing" of Muennighoff et al. 2025 (arXiv 2501.19393, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from unsloth_factory.data.template import ChatTemplate
from unsloth_factory.data.thinking import CLOSE


@dataclass(frozen=True)
class ThinkingBudget:
    """How long an answer may think before `closing_ids` are put in its place.

    Attributes:
        tokens: So many tokens.
        template: Knows where thinking begins and ends.
        thinking: The mode that the prompts were rendered with.
    """

    tokens: int
    template: ChatTemplate
    thinking: bool | None = True

    @cached_property  # made before the batches: a tokenizer's encoder must not be used in two threads at once
    def closing_ids(self) -> list[int]:
        """What ends the thinking, as the model itself would write it."""
        tokenizer = self.template.tokenizer
        if CLOSE not in self.template.control_tokens:
            return list(self.template.encode_text(f"\n{CLOSE}\n\n"))
        mark = tokenizer.convert_tokens_to_ids(CLOSE)
        return [*self.template.encode_text("\n"), mark, *self.template.encode_text("\n\n")]

    def is_thinking(self, ids: Sequence[int]) -> bool:
        """Whether the answer so far is nothing but thinking that has not been closed."""
        _, answer, _ = self.template.decode_answer(ids, self.thinking)
        return not answer and CLOSE not in self.template.tokenizer.decode(ids, skip_special_tokens=False)
