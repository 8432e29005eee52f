"""Step a batch of prompts through the model with a key/value cache.

Shapes: B rows, T tokens, V vocabulary. Rows are padded on the left, so that the last position is every row's newest
token and the output projection is computed there alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from unsloth_factory.model.loaded import LoadedModel


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both int64 [B, T]; shorter rows are padded on the left."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[index, width - len(row) :] = 1
    return ids, mask


def pad_id_of(loaded: LoadedModel) -> int:
    """Any valid id will do for padding (it is masked out); the tokenizer's own where it has one."""
    return loaded.tokenizer.pad_token_id if loaded.tokenizer.pad_token_id is not None else 0


@contextmanager
def evaluating(loaded: LoadedModel) -> Iterator[None]:
    """Evaluation mode (no dropout, no gradient checkpointing) for the time of the block."""
    was_training = loaded.model.training
    loaded.model.eval()
    try:
        yield
    finally:
        loaded.model.train(was_training)


class Decoder:
    """The state of one batch: its cache, its attention mask and the logits after the newest token.

    Args:
        loaded: The model; it must be in evaluation mode while the decoder is used.
        prompts: Token ids, at least one a row.

    Attributes:
        logits: Float32 [B, V] after the newest token of each row.
    """

    # The mode is entered anew in each method: held across the `yield` of a streaming caller it would leak to it.
    @torch.inference_mode()
    def __init__(self, loaded: LoadedModel, prompts: Sequence[Sequence[int]]) -> None:
        self._loaded = loaded
        self._cache = new_cache(loaded)
        ids, mask = pad_left(prompts, pad_id_of(loaded))
        self._mask = mask.to(loaded.device)
        self.logits = self._forward(ids.to(loaded.device), (self._mask.cumsum(1) - 1).clamp(min=0))

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return forward(self._loaded, ids, positions, self._mask, self._cache)[:, -1].float()

    @torch.inference_mode()
    def feed(self, tokens: Sequence[int]) -> None:
        """Append one token to each row and compute the logits after it."""
        ids = torch.tensor(tokens, dtype=torch.long, device=self._loaded.device).unsqueeze(1)
        positions = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        self.logits = self._forward(ids, positions)

    @torch.inference_mode()
    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone."""
        index = torch.tensor(rows, dtype=torch.long, device=self._loaded.device)
        self._cache.batch_select_indices(index)
        self._mask = self._mask[index]
        self.logits = self.logits[index]


def new_cache(loaded: LoadedModel) -> Any:
    """An empty key/value cache of the kind that the model's layers need."""
    from transformers import DynamicCache

    return DynamicCache(config=loaded.causal_lm.config)


def forward(
    loaded: LoadedModel,
    ids: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
    cache: Any,
    last: int | torch.Tensor = 1,
) -> torch.Tensor:
    """Logits of the last positions, [B, last, V]; the cache grows by the new tokens.

    Args:
        loaded: The model.
        ids: New tokens, int64 [B, T].
        positions: Their positions, int64 [B, T].
        mask: 1 for real tokens, int64 [B, cached + T]; or what is added to the scores, [B, 1, T, cached + T].
        cache: As made by `new_cache`.
        last: How many positions at the end go through the output projection; or which, int64 [last].
    """
    with loaded.autocast():
        output = loaded.causal_lm(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )
    return output.logits
