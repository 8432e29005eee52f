"""Dropout (Srivastava et al. 2014) whose mask is computed wherever it is needed, and kept nowhere.

Which numbers of x [T, K] are kept follows from a seed, a stream (each LoRA matrix has its own) and the place in x:
Philox-4x32 with ten rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by the seed, of
the counter (column, row, stream, 0). Its four words belong to the columns c, c + Q, c + 2 Q, c + 3 Q, Q = ceil(K / 4).
The seed is read from memory, so that a CUDA graph drops other numbers each time it is replayed.
"""

from __future__ import annotations

import torch

from unsloth_factory.kernels.launch import jit, runs_triton, tl

BLOCK = 256
"""Counters a program handles, four numbers each."""
WORD = 2**32
KEYS, FACTORS = (0x9E3779B9, 0xBB67AE85), (0xD2511F53, 0xCD9E8D57)
ROUNDS = 10


@jit
def _quarter(x_ptr, out_ptr, word, columns, start, inside, width, limit, scale, ADD: tl.constexpr):
    places = columns + start
    inside = inside & (places < width)
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    kept = tl.where(word.to(tl.int64) >= limit, x * scale, 0.0)
    if ADD:
        kept += tl.load(out_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, kept.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _kernel(
    x_ptr, out_ptr, seed_ptr, stream, x_stride, out_stride, width, quarter, limit, scale,
    ADD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < quarter
    nothing = columns * 0
    word0, word1, word2, word3 = tl.philox(tl.load(seed_ptr), columns, nothing + row, nothing + stream, nothing)
    x_ptr += row.to(tl.int64) * x_stride
    out_ptr += row.to(tl.int64) * out_stride
    _quarter(x_ptr, out_ptr, word0, columns, 0, inside, width, limit, scale, ADD)
    _quarter(x_ptr, out_ptr, word1, columns, quarter, inside, width, limit, scale, ADD)
    _quarter(x_ptr, out_ptr, word2, columns, 2 * quarter, inside, width, limit, scale, ADD)
    _quarter(x_ptr, out_ptr, word3, columns, 3 * quarter, inside, width, limit, scale, ADD)


def dropout(x: torch.Tensor, rate: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """A new tensor: x [T, K] with each number 0 with probability `rate`, and otherwise divided by 1 - `rate`.

    Args:
        x: Its rows may be parts of longer ones.
        rate: From 0 to below 1.
        seed: int64 [1], not negative, on x's device.
        stream: Different ones drop different numbers.
    """
    if runs_triton(x):
        return launch(x, rate, seed, stream, torch.empty(x.shape, dtype=x.dtype, device=x.device), add=False)
    return twin(x, rate, seed, stream)


def add_dropout(total: torch.Tensor, x: torch.Tensor, rate: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """Add `dropout` of x to `total` [T, K]; that is also how the gradient goes back through it."""
    if runs_triton(x):
        return launch(x, rate, seed, stream, total, add=True)
    return total.copy_((total.float() + twin(x.float(), rate, seed, stream)).to(total.dtype))


def launch(
    x: torch.Tensor, rate: float, seed: torch.Tensor, stream: int, out: torch.Tensor, *, add: bool
) -> torch.Tensor:
    """The Triton kernel."""
    rows, width = x.shape
    quarter = -(-width // 4)
    _kernel[(rows, -(-quarter // BLOCK))](
        x, out, seed, stream, x.stride(0), out.stride(0), width, quarter, round(rate * WORD), 1 / (1 - rate),
        ADD=add, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out


def twin(x: torch.Tensor, rate: float, seed: torch.Tensor, stream: int) -> torch.Tensor:
    """The same in plain torch."""
    rows, width = x.shape
    quarter = -(-width // 4)
    row, column = torch.arange(rows, device=x.device)[:, None], torch.arange(quarter, device=x.device)[None]
    words = philox(seed, [(column + 0 * row), (row + 0 * column), torch.full_like(row + column, stream)])
    kept = torch.cat(words, dim=1)[:, :width] >= round(rate * WORD)
    return torch.where(kept, x.float() * (1 / (1 - rate)), 0.0).to(x.dtype)


def philox(seed: torch.Tensor, counter: list[torch.Tensor]) -> list[torch.Tensor]:
    """Four random words of 32 bit for each counter, in int64.

    Args:
        seed: int64 [1]: its halves are the key.
        counter: The first words of the counters, int64 of one shape; those that are missing are 0.
    """
    words = [*counter, *[torch.zeros_like(counter[0])] * (4 - len(counter))]
    keys = [seed % WORD, seed // WORD % WORD]
    for _ in range(ROUNDS):
        (low_a, high_a), (low_b, high_b) = _product(words[0], FACTORS[0]), _product(words[2], FACTORS[1])
        words = [high_b ^ words[1] ^ keys[0], low_b, high_a ^ words[3] ^ keys[1], low_a]
        keys = [(key + step) % WORD for key, step in zip(keys, KEYS, strict=True)]
    return words


def _product(word: torch.Tensor, factor: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lower and upper word of a product of 32-bit numbers, which as a whole may not fit into int64."""
    upper, lower = (word >> 16) * factor, (word & 0xFFFF) * factor
    return ((upper << 16) + lower) % WORD, (upper + (lower >> 16)) >> 16
