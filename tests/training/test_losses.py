"""The loss rule: one sum over the trained tokens of a step, divided once, however the step is cut into batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_jobs import load, samples

from unsloth_factory.data.batching import pack, pad
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training import log_probs
from unsloth_factory.training.log_probs import token_log_probs, trained_positions
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Sft
from unsloth_factory.training.reporting.metrics import MetricsLog


@pytest.fixture(scope="module")
def model(random_model_dir: Path) -> LoadedModel:
    loaded = load(random_model_dir)
    torch.manual_seed(0)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name:  # B starts at 0, and then the gradient of A is 0 as well
            torch.nn.init.normal_(parameter, std=0.05)
    return loaded


def gradients(loaded: LoadedModel, rows: list, size: int, packing: bool) -> tuple[float, list[torch.Tensor]]:
    method = Sft()
    batches = [method.make_batch(rows[i : i + size], packing=packing, pad_id=0) for i in range(0, len(rows), size)]
    count = sum(method.count(batch) for batch in batches)
    loaded.model.zero_grad()
    total = 0.0
    for batch in batches:
        part = method.loss(loaded, batch).total / count
        part.backward()
        total += part.item()
    return total, [p.grad.clone() for p in loaded.trainable_parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize(("size", "packing"), [(1, True), (8, True), (8, False), (3, True), (3, False)])
def test_gradients_do_not_depend_on_the_batches(model: LoadedModel, size: int, packing: bool) -> None:
    rows = samples(8, seed=3)
    loss, wanted = gradients(model, rows, 1, False)
    other, got = gradients(model, rows, size, packing)
    assert other == pytest.approx(loss, rel=1e-6)
    for a, b in zip(wanted, got, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_loss_is_that_of_plain_cross_entropy(model: LoadedModel) -> None:
    rows = samples(3, seed=5)
    total = count = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids).long()[None]
        labels = torch.where(torch.from_numpy(row.trained), ids[0], -100)
        logits = model.model(input_ids=ids).logits[0, :-1].float()
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int(row.trained[1:].sum())
    part = Sft().loss(model, pack(rows))
    assert part.count == count
    assert part.total.item() == pytest.approx(total, rel=1e-5)


def test_chunks_change_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = pad(samples(4, seed=6), 0)
    positions = trained_positions(batch)
    results = []
    for limit in (model.logit_bytes, 4 * model.vocabulary * 7):  # all at once; 7 positions at a time
        model.logit_bytes = limit
        model.model.zero_grad()
        values = token_log_probs(model, batch, positions)
        values.sum().backward()
        results.append((values.detach(), [p.grad.clone() for p in model.trainable_parameters()]))
    assert log_probs.chunk_rows(model) == 7
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("make", [pack, lambda rows: pad(rows, 0)])
def test_lengths_are_those_of_each_sample(make) -> None:
    rows = samples(5, seed=7)
    assert trained_positions(make(rows)).lengths == [int(row.trained[1:].sum()) for row in rows]


def test_loss_curves_are_equal(tmp_path: Path, job_in) -> None:
    curves = []
    for number, (batch, accumulation, no_packing) in enumerate([(1, 8, False), (8, 1, False), (8, 1, True)]):
        loop = {"batch_size": batch, "accumulation_steps": accumulation, "no_packing": no_packing}
        job = job_in(tmp_path / str(number), loop=loop, run={"save_steps": 100})
        train(job)
        lines = MetricsLog(job.folder.metrics).read()
        curves.append([(line["loss"], line["grad_norm"], line["trained_tokens"]) for line in lines])
    for other in curves[1:]:
        assert torch.tensor(other).allclose(torch.tensor(curves[0]), rtol=2e-4)
