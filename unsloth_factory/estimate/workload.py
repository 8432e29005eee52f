"""The micro-batches of a training: from the lengths of its samples, or from an assumption about them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from unsloth_factory.estimate.layers import Rows

ASSUMED_SAMPLES = 1000
"""Without a dataset: samples, each of --max_seq_length tokens, half of them trained."""


@dataclass(frozen=True)
class Sample:
    """Lengths of the rows that a sample becomes (two for a preference pair), and their trained tokens."""

    lengths: tuple[int, ...]
    trained: int

    def cut(self, longest: int) -> Sample:
        """As --max_seq_length would leave it: the prompt gives way first."""
        if max(self.lengths) <= longest:
            return self
        lengths = tuple(min(length, longest) for length in self.lengths)
        return replace(self, lengths=lengths, trained=min(self.trained, sum(lengths)))


Order = Callable[[int, int, int], Iterable[list[list[int]]]]
"""(samples, batch size, accumulation steps) -> the micro-batches of every optimizer step, as sample indices."""
Merge = Callable[[Sequence[Sample], Callable[[Sample], tuple[int, ...]], int], Sequence[Sequence[Sample]]]
"""(samples of a step, lengths of one, tokens) -> the micro-batches of at most so many tokens that they become."""


@dataclass(frozen=True)
class Packed:
    """A micro-batch of the fast engine: documents one behind the other."""

    lengths: tuple[int, ...]
    trained: int
    """Positions with a target."""


@dataclass(frozen=True)
class Workload:
    """The samples of a training and how the optimizer walks over them."""

    samples: tuple[Sample, ...]
    order: Order
    packing: bool = True
    assumed: bool = False
    """Nothing is known of the data."""
    merge: Merge | None = None
    """How the fast engine puts the samples of a step together; None: it leaves the micro-batches as they are."""

    def steps(self, batch_size: int, accumulation_steps: int, longest: int) -> Steps:
        """The steps with these settings."""
        samples = self._samples(longest)
        batches, sizes, tokens = [], [], 0
        for step in self.order(len(samples), batch_size, accumulation_steps):
            made = [rows_of([samples[index] for index in group], self.packing) for group in step]
            batches += [rows for rows, _ in made]
            tokens += sum(count for _, count in made)
            sizes.append(len(made))
        return Steps(batches, len(sizes), tokens)

    def packed(self, batch_size: int, accumulation_steps: int, longest: int, budget: int | None) -> list[list[Packed]]:
        """The micro-batches of every step as the fast engine makes them, of at most `budget` tokens."""
        samples = self._samples(longest)
        steps = []
        for step in self.order(len(samples), batch_size, accumulation_steps):
            groups: Sequence[Sequence[Sample]] = [[samples[index] for index in group] for group in step]
            if self.merge is not None and self.packing and budget is not None:
                groups = self.merge([sample for group in groups for sample in group], lambda one: one.lengths, budget)
            steps.append([_packed(group) for group in groups])
        return steps

    def _samples(self, longest: int) -> list[Sample]:
        if self.assumed:
            return [partial_sample(longest, len(self.samples[0].lengths))] * len(self.samples)
        return [sample.cut(longest) for sample in self.samples]


def _packed(group: Sequence[Sample]) -> Packed:
    lengths = tuple(length for sample in group for length in sample.lengths)
    return Packed(lengths, sum(sample.trained for sample in group))


def partial_sample(length: int, rows: int) -> Sample:
    """A sample about which nothing is known but its length: half of it is trained."""
    return Sample((length,) * rows, rows * (length // 2))


@dataclass(frozen=True)
class Steps:
    """All micro-batches of a training."""

    batches: list[Rows]
    count: int
    """Optimizer steps."""
    tokens: int
    """Real tokens, padding left out."""

    @property
    def longest(self) -> Rows:
        """The micro-batch that takes the most memory: most rows, then most trained positions."""
        return max(self.batches, key=lambda rows: (rows.count, rows.trained))


def rows_of(samples: Sequence[Sample], packing: bool) -> tuple[Rows, int]:
    """A micro-batch, and its real tokens."""
    lengths = [length for sample in samples for length in sample.lengths]
    tokens, widest = sum(lengths), max(lengths)
    trained = sum(sample.trained for sample in samples)
    if packing:
        return Rows(count=tokens, width=tokens, masked=len(lengths) > 1, trained=trained), tokens
    masked = min(lengths) != widest
    return Rows(count=widest * len(lengths), width=widest, masked=masked, trained=trained), tokens


def uniform_order(
    samples: int, batch_size: int, accumulation_steps: int, *, epochs: float, max_steps: int | None
) -> Iterable[list[list[int]]]:
    """Samples in their order, without a seed: for samples that are all alike."""
    per_step = batch_size * accumulation_steps
    steps = max_steps or max(1, round(epochs * -(-samples // per_step)))
    step = [list(range(batch_size)) for _ in range(accumulation_steps)]
    return [[[index % samples for index in group] for group in step] for _ in range(steps)]


def assumed_workload(
    longest: int, rows: int, packing: bool, epochs: float, max_steps: int | None, merge: Merge | None = None
) -> Workload:
    """What is planned with when there is no dataset."""
    return Workload(
        samples=(partial_sample(longest, rows),) * ASSUMED_SAMPLES,
        order=partial(uniform_order, epochs=epochs, max_steps=max_steps),
        packing=packing,
        assumed=True,
        merge=merge,
    )
