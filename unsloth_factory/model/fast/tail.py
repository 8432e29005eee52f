"""What follows the last attention, for those positions alone that are trained.

Behind its attention a layer computes row by row, and what the last one computes for a token that is not trained goes
nowhere: with half of the tokens trained half of its output projection and of its MLP can be left out, forwards and
backwards, 1.2 % of the products of Qwen3-8B's 36 layers and 1.7 % of Qwen2-7B's 28. How many positions there are
differs from micro-batch to micro-batch, so these few launches are no part of CUDA graphs; Python issues them while the
GPU is busy with the graph before. Shapes: T tokens, n positions, h hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from unsloth_factory.kernels import rms_norm
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.layer import Layer, Saved, Saving, add_norm_gradient
from unsloth_factory.model.fast.spec import DecoderSpec

MOST_SHARE = 0.75
"""Of a row's tokens: with more positions little is left out, and what the tail keeps would no longer fit into the room
that a whole layer has for it in the arena."""
MOST_BYTES = 500 * 2**20
"""Of temporaries. They lie in the memory that is kept free for logits, which there are none of at the time."""


@dataclass
class Kept:
    """What the tail's backward pass needs."""

    saved: Saved
    last: torch.Tensor
    """[n, h] output of the last layer"""


@dataclass(frozen=True)
class Tail:
    """The rest of the last layer and the norm behind it."""

    layer: Layer
    norm: torch.Tensor
    """[h]: weight of the last norm."""

    def forward(
        self,
        x: torch.Tensor,
        wide: torch.Tensor,
        index: torch.Tensor,
        arena: Arena | None = None,
        seed: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Kept]:
        """(normed hidden states [n, h], what is kept).

        Args:
            x: [T, h] input of the last layer.
            wide: What its `attend` made.
            index: int64 [n] on the device, the positions.
            arena: Where what is kept lies, behind what the layers keep; None: in memory of its own.
            seed: Of LoRA dropout.
        """
        rows = torch.index_select(x, 0, index)
        picked = torch.index_select(wide, 0, index, out=self.layer.out.input(len(index), arena))
        saved = Saved(rows)
        last = self.layer.finish(rows, picked, saved, saving=Saving.KEEP, arena=arena, seed=seed)
        return rms_norm.rms_norm(last, self.norm, self.layer.spec.eps), Kept(saved, last)

    def backward(
        self, dhidden: torch.Tensor, kept: Kept, seed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient at what was attended to [n, Hq D], gradient at the layer's input beside it [n, h]).

        LoRA gradients are added up in the parameters. What is kept is used up.
        """
        eps = self.layer.spec.eps
        add_norm_gradient(self.norm, dhidden, kept.last, eps)
        top = self.layer.down.output(len(dhidden))
        rms_norm.rms_norm_backward(dhidden, kept.last, self.norm, eps, out=self.layer.down.y_of(top))
        dattended, dmiddle = self.layer.finish_backward(top, kept.saved, seed)
        return dattended, self.layer.out.y_of(dmiddle)


def pays(spec: DecoderSpec, tokens: int, positions: int, size: int = 2) -> bool:
    """Whether the last layer is done for the positions alone, by how many they are and what it takes in memory.

    Args:
        spec: Shapes.
        tokens: Of the row.
        positions: Of them that are asked for.
        size: Bytes of a number.
    """
    weight = 2 * spec.intermediate * spec.hidden
    temporaries = weight + positions * (3 * spec.intermediate + 4 * spec.hidden)
    return 0 < positions <= MOST_SHARE * tokens and size * temporaries <= MOST_BYTES


def spread(rows: torch.Tensor, index: torch.Tensor, place: torch.Tensor) -> None:
    """Fill `place` [T, columns] with rows [n, columns] at their positions and 0 elsewhere."""
    place.zero_().index_copy_(0, index, rows)
