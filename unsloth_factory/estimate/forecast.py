"""One choice of settings against one card: does it fit, how fast, how long; and which other choices there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from unsloth_factory.config.settings import OptimizerType
from unsloth_factory.estimate.fast_engine import FastEngine
from unsloth_factory.estimate.memory import MemoryEstimate, Rehearsal, Training
from unsloth_factory.estimate.speed import Host, Pace, update_seconds
from unsloth_factory.estimate.workload import Workload
from unsloth_factory.model.gpus import Gpu

Verdict = Literal["fits", "tight", "does not fit"]
COMFORT = 0.94
"""Share of the card's room up to which a training fits for certain: predictions were up to 4 % off."""
CLEARLY = 0.95
"""A choice is advised instead of the given one when it takes at most this share of its time."""
SHORTEST = 128
LENGTH_STEP = 64


@dataclass(frozen=True)
class Choice:
    """The settings that decide memory and speed; samples of a step = batch_size x accumulation_steps."""

    batch_size: int
    accumulation_steps: int
    checkpointing: bool
    quantized: bool
    optimizer: OptimizerType
    max_seq_length: int


@dataclass(frozen=True)
class Forecast:
    """What a choice comes to."""

    choice: Choice
    memory: MemoryEstimate
    verdict: Verdict
    steps: int
    tokens: int
    """Real tokens of the whole training."""
    longest: int
    """Rows of the largest micro-batch, padding included."""
    seconds: float | None = None
    """Of all steps; loading, evaluations and saving come on top. None where the card's speed is not known."""
    host_bound: bool = False
    """Python, not the card, sets the pace."""
    pinned: int = 0
    """Bytes of the CPU's memory for layer inputs that the card has no room for."""

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens a second."""
        return None if self.seconds is None else self.tokens / self.seconds

    @property
    def fits(self) -> bool:
        """Certainly, or probably."""
        return self.verdict != "does not fit"


class Forecaster:
    """Forecasts for choices around one training on one card; each choice is worked out once."""

    def __init__(self, training: Training, workload: Workload, gpu: Gpu, host: Host | None = None) -> None:
        self.training, self.workload, self.gpu = training, workload, gpu
        self.host = host or Host()
        self._known: dict[Choice, Forecast] = {}

    def forecast(self, choice: Choice) -> Forecast:
        """Memory, steps and time of a choice."""
        if choice not in self._known:
            self._known[choice] = self._work_out(choice)
        return self._known[choice]

    def _work_out(self, choice: Choice) -> Forecast:
        training = replace(
            self.training,
            quantized=choice.quantized,
            optimizer=choice.optimizer,
            checkpointing=choice.checkpointing,
            accumulates=choice.accumulation_steps > 1,
        )
        if training.engine == "fast":
            return self._fast(training, choice)
        steps = self.workload.steps(choice.batch_size, choice.accumulation_steps, choice.max_seq_length)
        memory = Rehearsal(training).estimate(steps.longest)
        forecast = Forecast(
            choice=choice,
            memory=memory,
            verdict=self._verdict(memory.reserved),
            steps=steps.count,
            tokens=steps.tokens,
            longest=steps.longest.count,
        )
        if self.gpu.products is None or self.gpu.bandwidth is None:
            return forecast
        pace = Pace(training, self.gpu, self.host, steps.batches)
        seconds = sum(pace.seconds(rows.count) for rows in steps.batches)
        seconds += steps.count * update_seconds(training, self.gpu, self.host)
        return replace(forecast, seconds=seconds, host_bound=pace.typical.host_bound)

    def _verdict(self, needed: int) -> Verdict:
        share = needed / self.gpu.room
        return "fits" if share <= COMFORT else "tight" if share <= 1 else "does not fit"

    def _fast(self, training: Training, choice: Choice) -> Forecast:
        """With the fast engine, which takes what there is: whether it fits depends on the least that it needs."""
        engine = FastEngine(training, self.gpu)
        sizes = choice.batch_size, choice.accumulation_steps, choice.max_seq_length
        steps = self.workload.packed(*sizes, engine.budget)
        micro_batches = [one for step in steps for one in step]
        known = self.gpu.products is not None and self.gpu.bandwidth is not None
        return Forecast(
            choice=choice,
            memory=engine.memory(micro_batches),
            verdict=self._verdict(engine.least(micro_batches)),
            steps=len(steps),
            tokens=sum(sum(one.lengths) for one in micro_batches),
            longest=max(sum(one.lengths) for one in micro_batches),
            seconds=engine.seconds(steps) if known else None,
            pinned=engine.pinned(micro_batches),
        )


def splits(choice: Choice) -> list[Choice]:
    """The same samples in a step, in micro-batches of other sizes: powers of two, smallest first."""
    samples = choice.batch_size * choice.accumulation_steps
    sizes = [2**power for power in range(samples.bit_length()) if samples % 2**power == 0]
    return [replace(choice, batch_size=size, accumulation_steps=samples // size) for size in sizes]


def best(forecaster: Forecaster, choice: Choice) -> Forecast | None:
    """The fastest choice that fits and computes the same: micro-batch size and checkpointing alone are changed.

    The choice itself, where it fits and nothing is clearly faster. On a card of unknown speed: the largest micro-batch
    that fits, without checkpointing where that fits.
    """
    if forecaster.training.engine == "fast":  # which cuts micro-batches and recomputes layers as it sees fit
        own = forecaster.forecast(choice)
        return own if own.verdict == "fits" else None
    found: list[Forecast] = []
    for checkpointing in (False, True):
        for candidate in splits(replace(choice, checkpointing=checkpointing)):
            forecast = forecaster.forecast(candidate)
            if forecast.verdict == "fits":
                found.append(forecast)
            elif not forecast.fits:
                break  # a larger micro-batch takes more
    if not found:
        return None
    if found[0].seconds is None:
        return found[-1] if all(f.choice.checkpointing for f in found) else _last_kept(found)
    fastest, own = min(found, key=lambda forecast: forecast.seconds or 0.0), forecaster.forecast(choice)
    clearly = own.verdict != "fits" or (fastest.seconds or 0.0) < CLEARLY * (own.seconds or 0.0)
    return fastest if clearly else own


def _last_kept(found: list[Forecast]) -> Forecast:
    return [forecast for forecast in found if not forecast.choice.checkpointing][-1]


def changes(old: Choice, new: Choice) -> list[str]:
    """What is different, in words."""
    words = []
    if new.batch_size != old.batch_size:
        words.append(f"micro-batches of {new.batch_size} x {new.accumulation_steps}")
    if new.checkpointing != old.checkpointing:
        words.append("checkpointing" if new.checkpointing else "no checkpointing")
    if new.optimizer != old.optimizer:
        words.append(new.optimizer)
    if new.quantized != old.quantized:
        words.append("4-bit base weights" if new.quantized else "16-bit base weights")
    if new.max_seq_length != old.max_seq_length:
        words.append(f"samples of at most {new.max_seq_length:,} tokens")
    return words


def reductions(choice: Choice, kind: str, engine: str = "standard") -> Iterator[Choice]:
    """What can be given up, cheapest first; each keeps the ones before it. The samples of a step stay."""
    if engine == "standard":
        for smaller in reversed([split for split in splits(choice) if split.batch_size < choice.batch_size]):
            choice = smaller
            yield choice
        if not choice.checkpointing:
            choice = replace(choice, checkpointing=True)
            yield choice
    if choice.optimizer == "adamw":
        choice = replace(choice, optimizer="adamw_8bit")
        yield choice
    if kind == "lora" and not choice.quantized:
        choice = replace(choice, quantized=True)
        yield choice
    if choice.optimizer == "adamw_8bit":
        yield replace(choice, optimizer="paged_adamw_8bit")


def first_that_fits(forecaster: Forecaster, choice: Choice) -> Forecast | None:
    """The cheapest reductions with which it fits, at last shorter samples; None: nothing fits.

    What had been given up before the decisive reduction is taken back where that still fits.
    """
    candidate = choice
    for candidate in reductions(choice, forecaster.training.kind, forecaster.training.engine):
        if forecaster.forecast(candidate).verdict == "fits":
            kept = replace(candidate, optimizer=choice.optimizer)
            candidate = kept if forecaster.forecast(kept).verdict == "fits" else candidate
            return best(forecaster, candidate) or forecaster.forecast(candidate)
    length = longest_that_fits(forecaster, candidate)
    return None if length is None else forecaster.forecast(replace(candidate, max_seq_length=length))


def longest_that_fits(forecaster: Forecaster, choice: Choice, limit: int | None = None) -> int | None:
    """Largest --max_seq_length, a multiple of 64, with which the choice fits; None: not even the shortest does."""
    low, high = SHORTEST // LENGTH_STEP, (limit or choice.max_seq_length) // LENGTH_STEP
    if forecaster.forecast(replace(choice, max_seq_length=SHORTEST)).verdict != "fits":
        return None
    while low < high:
        middle = (low + high + 1) // 2
        fits = forecaster.forecast(replace(choice, max_seq_length=middle * LENGTH_STEP)).verdict == "fits"
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * LENGTH_STEP


def larger(forecaster: Forecaster, choice: Choice) -> list[tuple[str, Forecast]]:
    """The next larger choices, one change each, whether they fit or not."""
    options: list[tuple[str, Choice]] = []
    standard = forecaster.training.engine == "standard"
    if choice.checkpointing and standard:
        options.append(("no checkpointing", replace(choice, checkpointing=False)))
    if choice.accumulation_steps % 2 == 0 and standard:
        twice = replace(choice, batch_size=2 * choice.batch_size, accumulation_steps=choice.accumulation_steps // 2)
        options.append((f"micro-batches of {twice.batch_size}", twice))
    if choice.quantized and not forecaster.training.shape.prequantized:
        options.append(("16-bit base weights", replace(choice, quantized=False)))
    if choice.optimizer != "adamw":
        options.append(("32-bit optimizer", replace(choice, optimizer="adamw")))
    double = 2 * choice.max_seq_length
    if forecaster.workload.assumed and double <= forecaster.training.shape.max_positions:
        options.append((f"samples up to {double:,} tokens", replace(choice, max_seq_length=double)))
    return [(what, forecaster.forecast(candidate)) for what, candidate in options]
