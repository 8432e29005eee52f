"""The pace of the machine at hand, measured in a few seconds: how fast Python hands kernels over, and the card's rates.

The bundled tiny model does a real forward and backward pass on the card. Its kernels are so short that Python sets the
pace; the time over the number of kernels that the rehearsal counts is the figure sought.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from unsloth_factory.model.gpus import Gpu
from unsloth_factory.training.estimate.layers import Rows
from unsloth_factory.training.estimate.memory import Training, micro_batch_cost
from unsloth_factory.training.estimate.speed import Host, micro_batch_speed

if TYPE_CHECKING:
    import torch

TOKENS, WARM_UP, REPEATS = 640, 4, 12
SLOWEST = 20.0
"""Times the pace of the machine on which `Host` was fitted; more than that is a fault of the measurement."""


def measured_host(training: Training) -> Host:
    """Seconds of a kernel's hand-over for this kind of training on this machine."""
    return _measured_host(training.kind, training.quantized, training.checkpointing)


@lru_cache
def _measured_host(kind: str, quantized: bool, checkpointing: bool) -> Host:
    from unsloth_factory.config.settings import ModelSettings, TuningSettings
    from unsloth_factory.model.load import load_model
    from unsloth_factory.model.shapes import find_config, read_shape

    loaded = load_model(
        ModelSettings(model="tiny"),
        quantization_bit=4 if quantized else None,
        for_training=True,
        tuning=TuningSettings(finetuning_type=kind),  # type: ignore[arg-type]
    )
    loaded.model.train()
    loaded.set_gradient_checkpointing(checkpointing)
    seconds = _micro_batch_seconds(loaded)
    tiny = Training(
        shape=read_shape(find_config("tiny")),
        kind=kind,  # type: ignore[arg-type]
        quantized=quantized,
        checkpointing=checkpointing,
    )
    work = micro_batch_cost(tiny, Rows(TOKENS, TOKENS, False, TOKENS // 2))
    endless = Gpu("", 0, 1e18, 1e18)
    expected = micro_batch_speed(work, endless, Host(), masked=False).host
    return Host().slowed(min(SLOWEST, max(1 / SLOWEST, seconds / expected)), measured=True)


def _micro_batch_seconds(loaded: Any) -> float:
    """Median time of a forward and backward pass, the card's work included."""
    import numpy as np
    import torch

    from unsloth_factory.data.batching import pack
    from unsloth_factory.data.types import TokenSample
    from unsloth_factory.training.methods import METHODS

    generator = np.random.default_rng(0)
    ids = generator.integers(10, 4000, TOKENS).astype(np.int32)
    batch = pack([TokenSample(ids, np.arange(TOKENS) >= TOKENS // 2, "measurement:1")])
    method = METHODS["sft"]()

    def once() -> float:
        _wait(loaded.device)
        started = time.perf_counter()
        with loaded.autocast():
            total = method.loss(loaded, batch).total
        total.backward()
        _wait(loaded.device)
        return time.perf_counter() - started

    times = [once() for _ in range(WARM_UP + REPEATS)][WARM_UP:]
    for parameter in loaded.trainable_parameters():
        parameter.grad = None
    if loaded.device.type == "cuda":
        torch.cuda.empty_cache()
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_gpu(gpu: Gpu) -> Gpu:
    """The card with measured rates; those of the table stay where they were measured."""
    if gpu.measured:
        return gpu
    import torch

    dtype = torch.bfloat16 if gpu.capability >= (8, 0) else torch.float16
    first, second = (torch.randn(4096, 4096, device="cuda", dtype=dtype) for _ in range(2))
    products = 2 * 4096**3 / _clock(partial(torch.matmul, first, second))
    source = torch.randn(2**27, device="cuda", dtype=dtype)
    bandwidth = 4 * 2**27 / _clock(torch.empty_like(source).copy_, source)
    del first, second, source
    torch.cuda.empty_cache()
    return replace(gpu, products=products, bandwidth=bandwidth, measured=True, source="measured here")


def _clock(function: Callable[..., Any], *arguments: Any, repeats: int = 20) -> float:
    """Seconds of one call on the card."""
    import torch

    for _ in range(5):
        function(*arguments)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function(*arguments)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / repeats / 1e3
