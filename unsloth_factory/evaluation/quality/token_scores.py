"""How far a quantised file is from the 16-bit one: both read the same answers, and every distribution counts.

The statistics are those of llama.cpp's perplexity tool (`llama-perplexity --kl-divergence`): perplexity and its ratio,
KL divergence from the 16-bit file's distribution (mean, median, 99th percentile, maximum), how often both hold the same
token likeliest, and the root mean square change of the right token's probability. Three things differ: the text is the
held-out answers in their chat template instead of running text; attention is computed in float32, so that the weights'
rounding is measured alone; and the standard errors take the tokens of one answer together (they are not independent),
by leaving out one answer at a time.

Shapes: n answer tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.types import TokenSample
from unsloth_factory.inference.distributions import log_softmax
from unsloth_factory.inference.generate import Progress
from unsloth_factory.inference.llama_cpp import LlamaCpp

LOGITS_TOGETHER = 2**23
"""Logits held at a time, numbers: 64 MiB in float64, of which there are a few."""
TailLogits = Callable[[list[int], int], np.ndarray]


@dataclass(frozen=True)
class TokenScores:
    """What one file makes of each answer token, arrays [n] in the order of the samples."""

    answer: np.ndarray
    """Number of the sample, int64."""
    loss: np.ndarray
    """-log p of the token, nats, float64."""
    right: np.ndarray
    """Whether the token is the likeliest, bool."""
    divergence: np.ndarray
    """KL(16-bit || file) of the distribution that predicts it, nats, float64; 0 for the 16-bit file itself."""
    same_top: np.ndarray
    """Whether both files hold the same token likeliest, bool."""

    def arrays(self) -> dict[str, Any]:
        """By name, as numpy's savez takes them."""
        return dict(vars(self))


def answer_samples(samples: Sequence[TokenSample], max_positions: int, max_tokens: int) -> list[TokenSample]:
    """Samples that fit the model's context, in order, up to about `max_tokens` answer tokens.

    Raises:
        UserError: Fewer than two are left: from one answer no error can be told.
    """
    kept: list[TokenSample] = []
    used = 0
    for sample in samples:
        count = int(sample.trained[1:].sum())
        if not count or len(sample.ids) > max_positions:
            continue
        if len(kept) >= 2 and used + count > max_tokens:
            break
        kept.append(sample)
        used += count
    if len(kept) < 2:
        raise UserError(
            f"{len(kept)} held-out answers fit the model's context of {max_positions} tokens; at least 2 are needed to "
            "tell a loss from chance. Hold more out (--val_split), or give more with --dataset."
        )
    return kept


def reference_bytes(samples: Sequence[TokenSample], vocabulary: int) -> int:
    """Size of the 16-bit file's distributions on the disk."""
    return 4 * vocabulary * sum(int(sample.trained[1:].sum()) for sample in samples)


def score_reference(
    llama: LlamaCpp, samples: Sequence[TokenSample], store: IO[bytes], on_progress: Progress | None = None
) -> TokenScores:
    """Read the answers with the 16-bit file and write its log-probabilities, float32 [n, V], into `store`."""
    parts = []
    for at, targets, logits in _answers(llama.tail_logits, llama.vocab_size, samples, on_progress):
        ours = log_softmax(logits)
        store.write(ours.astype(np.float32).tobytes())
        parts.append(_scores(at, targets, ours, ours))
    return _joined(parts)


def score_file(
    llama: LlamaCpp,
    samples: Sequence[TokenSample],
    store: IO[bytes],
    vocabulary: int,
    on_progress: Progress | None = None,
) -> TokenScores:
    """Read the answers with another file and compare with what `score_reference` stored.

    Args:
        llama: The file.
        samples: The same as for the reference.
        store: What `score_reference` wrote; read from its start.
        vocabulary: Of the reference.
        on_progress: Called with (answers done, all).

    Raises:
        UserError: The file has another vocabulary.
    """
    if llama.vocab_size != vocabulary:
        raise UserError(
            f"{llama.path.name} has a vocabulary of {llama.vocab_size:,} tokens, the 16-bit file one of "
            f"{vocabulary:,}: it was made from another model."
        )
    store.seek(0)
    parts = []
    for at, targets, logits in _answers(llama.tail_logits, vocabulary, samples, on_progress):
        raw = store.read(4 * logits.size)
        theirs = np.frombuffer(raw, dtype=np.float32).reshape(logits.shape).astype(np.float64)
        parts.append(_scores(at, targets, log_softmax(logits), theirs))
    return _joined(parts)


def _answers(
    tail_logits: TailLogits, vocabulary: int, samples: Sequence[TokenSample], on_progress: Progress | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number of the sample, answer tokens [k], logits that predict them [k, V]) piece by piece.

    Each piece is fed behind what the engine still holds of its sample, so that every token is computed once.
    """
    longest = max(1, LOGITS_TOGETHER // vocabulary)
    for at, sample in enumerate(samples):
        ids = sample.ids.tolist()
        wanted = np.flatnonzero(sample.trained[1:]) + 1
        spans = np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1)  # an answer each, in a longer conversation
        for span in spans:
            for start in range(0, len(span), longest):
                piece = span[start : start + longest]
                yield at, sample.ids[piece].astype(np.int64), tail_logits(ids[: int(piece[-1])], len(piece))
        if on_progress:
            on_progress(at + 1, len(samples))


def _scores(at: int, targets: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> TokenScores:
    """Of one piece; log-probabilities float64 [k, V] of this file and of the 16-bit one."""
    rows = np.arange(len(targets))
    top = ours.argmax(axis=1)
    # Not below 0: the stored float32 are rounded by 1e-7 of their size.
    divergence = np.maximum((np.exp(theirs) * (theirs - ours)).sum(axis=1), 0.0)
    return TokenScores(
        answer=np.full(len(targets), at),
        loss=-ours[rows, targets],
        right=top == targets,
        divergence=divergence,
        same_top=top == theirs.argmax(axis=1),
    )


def _joined(parts: Sequence[TokenScores]) -> TokenScores:
    names = parts[0].arrays()
    return TokenScores(**{name: np.concatenate([part.arrays()[name] for part in parts]) for name in names})
