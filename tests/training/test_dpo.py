"""DPO: numbers by hand, the reference policy, and TRL."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from training_jobs import load, pairs

from unsloth_factory.config.errors import UserError
from unsloth_factory.config.settings import TuningSettings
from unsloth_factory.model.loaded import LoadedModel
from unsloth_factory.training.loop import train
from unsloth_factory.training.methods import Dpo, dpo

TUNING = TuningSettings(lora_r=4)


def stir(loaded: LoadedModel, seed: int = 0) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.trainable_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_loss_by_hand(random_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(random_model_dir)
    # Two pairs, beta 0.5. Policy minus reference: chosen 1, -2; rejected -1, 2. Margins 0.5 * 2 = 1 and 0.5 * -4 = -2.
    # Loss = log(1 + e^-1) + log(1 + e^2) = 0.313262 + 2.126928
    reference = torch.tensor([-10.0, -20.0, -30.0, -40.0])
    policy = reference + torch.tensor([1.0, -2.0, -1.0, 2.0])
    answers = iter([reference, policy])  # the reference is asked first
    monkeypatch.setattr(dpo, "_answer_log_probs", lambda *_: next(answers))
    method = Dpo(beta=0.5)
    method.prepare(loaded, TUNING)
    result = method.loss(loaded, method.make_batch(pairs(2), packing=True, pad_id=0))
    assert result.total.item() == pytest.approx(0.313262 + 2.126928, abs=1e-5)
    assert result.count == 2
    assert {name: float(value) for name, value in result.metrics.items()} == {
        "rewards/chosen": -0.5,  # 0.5 * (1 - 2)
        "rewards/rejected": 0.5,
        "rewards/accuracies": 1.0,
        "rewards/margins": -1.0,
    }


@pytest.mark.parametrize("packing", [True, False])
def test_answer_log_probs(random_model_dir: Path, packing: bool) -> None:
    loaded = load(random_model_dir)
    stir(loaded)
    rows = pairs(3)
    batch = Dpo().make_batch(rows, packing=packing, pad_id=0)
    got = dpo._answer_log_probs(loaded, batch, dpo.trained_positions(batch))
    for value, row in zip(got, [p.chosen for p in rows] + [p.rejected for p in rows], strict=True):
        ids = torch.from_numpy(row.ids).long()
        log_probs = loaded.model(input_ids=ids[None]).logits[0].log_softmax(-1)
        wanted = sum(log_probs[t - 1, ids[t]] for t in range(len(ids)) if row.trained[t])
        assert value.item() == pytest.approx(float(wanted.detach()), rel=1e-5)


def test_first_loss_is_log_two_also_when_an_adapter_goes_on(random_model_dir: Path) -> None:
    for stirred in (False, True):
        loaded = load(random_model_dir)
        if stirred:
            stir(loaded)
        method = Dpo()
        method.prepare(loaded, TUNING)
        part = method.loss(loaded, method.make_batch(pairs(4), packing=True, pad_id=0))
        assert part.total.item() / 4 == pytest.approx(math.log(2), abs=1e-6)
        part.total.backward()
        # The policy moves, the reference does not.
        before = [p.detach().clone() for p in loaded.trainable_parameters()]
        stir(loaded, seed=1)
        moved = method.loss(loaded, method.make_batch(pairs(4), packing=True, pad_id=0))
        assert abs(moved.total.item() / 4 - math.log(2)) > 1e-4
        assert not torch.equal(before[0], loaded.trainable_parameters()[0])
        assert (method.settings()["reference"] == "base") is not stirred


def test_training_raises_the_margin(tmp_path: Path, job_in) -> None:
    job = job_in(
        tmp_path, method=Dpo(), train_items=pairs(8), eval_items=pairs(3, seed=4), loop={"epochs": 4, "batch_size": 4}
    )
    result = train(job)
    assert result.final_loss is not None
    assert result.final_loss < math.log(2)
    assert set(result.eval_metrics) == {
        "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    }  # fmt: skip
    import json

    lines = [json.loads(line) for line in job.folder.metrics.read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert "eval_rewards/accuracies" in lines[-1]


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_no_adapter_no_dpo(random_model_dir: Path, kind: str) -> None:
    tuning = TuningSettings(finetuning_type=kind, freeze_last_n=1)  # type: ignore[arg-type]
    loaded = load(random_model_dir, tuning)
    with pytest.raises(UserError, match=f"--finetuning_type {kind} with dpo.*--finetuning_type lora"):
        Dpo().prepare(loaded, tuning)


def test_beta_must_be_positive() -> None:
    with pytest.raises(UserError, match="--beta 0"):
        Dpo(beta=0)


class PlainLogProbs:
    """What TRL's Triton kernel computes; that kernel needs a GPU."""

    @staticmethod
    def apply(hidden, weight, bias, labels, *_):
        log_probs = (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
        unused = torch.zeros_like(log_probs)  # entropy and the like, for its log only
        return log_probs, unused, unused, unused, unused.bool()


@pytest.mark.peer
def test_equals_trl(random_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl")
    trl_utils = pytest.importorskip("trl.trainer.utils")
    from datasets import Dataset

    if not torch.cuda.is_available():  # TRL's own is a Triton kernel, and without Triton None
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", PlainLogProbs)
    loaded = load(random_model_dir)
    rows = pairs(4)
    data = Dataset.from_list([
        {"prompt": "a", "chosen": "b", "rejected": "c"} for _ in rows
    ])  # fmt: skip
    config = trl.DPOConfig(
        output_dir=str(tmp_path), beta=0.3, per_device_train_batch_size=4, report_to=[], bf16=False, use_cpu=True,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip
    trainer = trl.DPOTrainer(model=loaded.model, args=config, train_dataset=data, processing_class=loaded.tokenizer)
    method = Dpo(beta=0.3)
    method.prepare(loaded, TUNING)
    stir(loaded)  # after prepare: the reference stays the base model
    ids, mask, trained = [], [], []
    ordered = [p.chosen for p in rows] + [p.rejected for p in rows]
    width = max(len(row.ids) for row in ordered)
    for row in ordered:
        gap = width - len(row.ids)
        ids.append([*row.ids.tolist(), *[0] * gap])
        mask.append([1] * len(row.ids) + [0] * gap)
        trained.append([*row.trained.astype(int).tolist(), *[0] * gap])
    inputs = {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "completion_mask": torch.tensor(trained),
    }
    wanted = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    for packing in (True, False):
        part = method.loss(loaded, method.make_batch(rows, packing=packing, pad_id=0))
        assert part.total.item() / part.count == pytest.approx(wanted.item(), abs=1e-5)
