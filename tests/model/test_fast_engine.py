"""The fast engine computes what the standard one computes: hidden states, gradients of every LoRA matrix, answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.kernels.attention import Documents
from unsloth_factory.kernels.dropout import twin
from unsloth_factory.kernels.rotary import Heads
from unsloth_factory.model import tuning
from unsloth_factory.model.fast import trained
from unsloth_factory.model.fast.arena import Arena
from unsloth_factory.model.fast.decoder import STREAMS
from unsloth_factory.model.fast.embedding import HostEmbedding
from unsloth_factory.model.fast.graphs import Bucket
from unsloth_factory.model.fast.head import cross_entropy_sum
from unsloth_factory.model.fast.layer import Row, Saving
from unsloth_factory.model.fast.load import FUSED, FolderWeights, load_fast
from unsloth_factory.model.fast.planner import divide, saved_numbers
from unsloth_factory.model.fast.spec import DecoderSpec, why_not
from unsloth_factory.model.load import load_model
from unsloth_factory.model.lora import attach_lora
from unsloth_factory.model.standard import load_base

CPU = torch.device("cpu")
TUNING = TuningSettings(lora_r=4, lora_alpha=8)


def both(folder: Path, *, bits: int | None = None, tuning: TuningSettings = TUNING) -> tuple[Any, Any]:
    from transformers import AutoConfig

    standard = load_base(folder, quantization_bit=bits, device=CPU, dtype=torch.float32)
    weights = FolderWeights(folder, CPU, torch.float32)
    fast = load_fast(weights, AutoConfig.from_pretrained(folder), quantized=bits is not None)
    models = [attach_lora(model, tuning, 7) for model in (standard, fast)]
    fast.model.bind()
    for model in models:
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        model.train()
    return models[0], models[1]


def packed_inputs(vocabulary: int = 300) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(n) for n in (7, 1, 12)])[None]
    return {"input_ids": torch.randint(5, vocabulary, (1, 20), generator=generator), "position_ids": positions}


def run(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    hidden = model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2]))
    (hidden * weights * mask[..., None]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach() * mask[..., None], gradients


def same(first: tuple[Any, Any], second: tuple[Any, Any], tolerance: float = 2e-5) -> None:
    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm().clamp(min=1e-6))

    assert error(first[0], second[0]) < tolerance
    assert set(first[1]) == set(second[1])
    worst = max((error(first[1][name], second[1][name]), name) for name in first[1])
    assert worst[0] < tolerance, worst


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_gradients_of_packed_rows(family_dir, family):
    standard, fast = both(family_dir(family))
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


def both_trained(folder: Path, last_n: int | None) -> tuple[Any, Any]:
    """Full or freeze fine-tuning by both engines, in float32."""
    from transformers import AutoConfig

    standard = load_base(folder, quantization_bit=None, device=CPU, dtype=torch.float32)
    fast = load_fast(FolderWeights(folder, CPU, torch.float32), AutoConfig.from_pretrained(folder), quantized=False)
    if last_n is None:
        tuning.train_all(standard)
        trained.train_all(fast, torch.float32)
    else:
        tuning.train_last_layers(standard, last_n)
        trained.train_last_layers(fast, last_n, torch.float32)
    fast.model.bind()
    for model in (standard, fast):
        model.get_base_model = lambda model=model: model
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.requires_grad:  # 1 everywhere hides what forgets them
                values = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5
                parameter.data.copy_(values)
    return standard.train(), fast.train()


@pytest.mark.parametrize("last_n", [None, 1, 2])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "mistral"])
def test_gradients_of_the_weights_themselves(family_dir, family, last_n):
    standard, fast = both_trained(family_dir(family), last_n)
    wanted, found = run(standard, packed_inputs()), run(fast, packed_inputs())
    head = found[1].pop("lm_head.weight", None)  # no part of what `run` computes
    assert head is None or not head.any()
    same(found, wanted)
    trains = {name for name, p in fast.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in standard.named_parameters() if p.requires_grad}
    assert set(found[1]) == trains - {"lm_head.weight"}


def test_gradient_of_the_head():
    hidden, weight, targets = torch.randn(20, 8), torch.randn(30, 8), torch.arange(20)
    found = []
    for chunk in (None, 4 * 30 * 7):  # torch's own, and seven rows at a time
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if chunk is None:
            loss = F.cross_entropy(inputs[0] @ inputs[1].T, targets, reduction="sum")
        else:
            loss = cross_entropy_sum(inputs[0], inputs[1], targets, chunk)
        found.append((loss, *torch.autograd.grad(loss * 0.3, inputs)))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("saving", list(Saving))
def test_gradients_of_the_weights_are_bit_equal_whatever_is_kept(random_model_dir, saving):
    _, fast = both_trained(random_model_dir, None)
    kept = run(fast, packed_inputs())
    fast.model.planner.forced = saving
    again = run(fast, packed_inputs())
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


def test_trained_weights_add_gradients_up_and_compute_in_16_bit(random_model_dir):
    from transformers import AutoConfig

    weights = FolderWeights(random_model_dir, CPU, torch.float32)
    fast = load_fast(weights, AutoConfig.from_pretrained(random_model_dir), quantized=False)
    trained.train_all(fast, torch.bfloat16)
    inputs = packed_inputs()
    hidden = fast.model(**inputs).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    hidden.float().square().sum().backward()
    once = {name: p.grad.clone() for name, p in fast.named_parameters()}
    fast.model(**inputs).last_hidden_state.float().square().sum().backward()
    for name, gradient in once.items():
        assert gradient.dtype == torch.float32
        assert gradient.any() or name == "lm_head.weight", name
        assert torch.allclose(fast.get_parameter(name).grad, 2 * gradient, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_trained_weights_in_bfloat16_are_about_as_exact_as_by_torch(family_dir, family):
    """torch's autocast leaves hidden states between layers in float32, the fast engine has them in 16 bit."""

    def gradients(engine: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        loaded = load_model(
            ModelSettings(model=str(family_dir(family)), engine=engine), dtype=dtype, for_training=True,
            tuning=TuningSettings(finetuning_type="full"), device=CPU,
        )  # fmt: skip
        loaded.model.train()
        inputs = packed_inputs()
        hidden = loaded.hidden_states(inputs["input_ids"], inputs["position_ids"], None)
        with loaded.autocast():
            loaded.lm_head(hidden).float().square().mean().backward()
        return {name: p.grad for name, p in loaded.model.named_parameters()}

    reference = gradients("standard", torch.float32)
    standard, fast = (gradients(engine, torch.bfloat16) for engine in ("standard", "fast"))
    for name, wanted in reference.items():
        assert fast[name].dtype == torch.float32
        ours, theirs = ((found[name] - wanted).norm() / wanted.norm() for found in (fast, standard))
        assert ours <= 1.6 * theirs + 5e-3, name


DROPPED = TuningSettings(lora_r=4, lora_alpha=8, lora_dropout=0.3)


class SameDropout(torch.nn.Module):
    """In peft's place for it: drops what the fast engine drops in one matrix."""

    def __init__(self, seed: torch.Tensor, stream: int) -> None:
        super().__init__()
        self.seed, self.stream = seed, stream

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = twin(torch.ones(x.shape[1:]), DROPPED.lora_dropout, self.seed, self.stream)
        return x * mask[None]


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_lora_dropout(family_dir, family, bits):
    """With the same masks the gradients are peft's; and there are none unless it trains."""
    standard, fast = both(family_dir(family), bits=bits, tuning=DROPPED)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, (1,))
    for index, layer in enumerate(standard.get_base_model().model.layers):
        for number, parts in enumerate(FUSED.values()):
            for place, name in enumerate(parts):
                stream = STREAMS * (4 * index + number) + place
                layer.get_submodule(name).lora_dropout["default"] = SameDropout(seed, stream)
    torch.manual_seed(11)
    ours = run(fast, packed_inputs())
    same(ours, run(standard, packed_inputs()))
    other = run(fast, packed_inputs())
    assert (other[0] - ours[0]).abs().max() > 1e-3  # another micro-batch, other numbers
    torch.manual_seed(11)
    before = torch.get_rng_state()
    plain = run(fast.eval(), packed_inputs())
    assert torch.equal(torch.get_rng_state(), before)
    same(plain, run(both(family_dir(family), bits=bits)[1], packed_inputs()), 1e-6)


def test_dropout_differs_between_layers_and_projections(random_model_dir):
    _, fast = both(random_model_dir, tuning=DROPPED)
    decoder = fast.get_base_model().model
    streams = [
        one.stream + place
        for layer in decoder.stack
        for one in layer.projections.values()
        for place in range(len(one.parts))
    ]
    assert len(streams) == len(set(streams)) == 7 * len(decoder.stack)


@pytest.mark.parametrize("saving", list(Saving))
def test_dropout_is_the_same_when_a_layer_is_computed_again(random_model_dir, saving):
    _, fast = both(random_model_dir, tuning=DROPPED)
    torch.manual_seed(3)
    kept = run(fast, packed_inputs())
    fast.get_base_model().model.planner.forced = saving
    torch.manual_seed(3)
    again = run(fast, packed_inputs())
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize("saving", list(Saving))
def test_gradients_are_bit_equal_whatever_is_kept(random_model_dir, saving):
    _, fast = both(random_model_dir)
    kept = run(fast, packed_inputs())
    fast.get_base_model().model.planner.forced = saving
    again = run(fast, packed_inputs())
    assert torch.equal(kept[0], again[0])
    assert all(torch.equal(kept[1][name], again[1][name]) for name in kept[1])


@pytest.mark.parametrize(
    "plan", [[Saving.KEEP] * 2, [Saving.RECOMPUTE, Saving.KEEP], [Saving.DROP_GATE_UP] * 2, [Saving.RECOMPUTE] * 2]
)
def test_what_is_kept_lies_in_the_arena(random_model_dir, plan):
    """The same bits as without it, in the room that the planner counts."""
    _, fast = both(random_model_dir)
    decoder = fast.get_base_model().model
    inputs = packed_inputs()
    decoder.planner.forced = plan
    plain = run(fast, inputs)
    row = Row(
        *decoder.table.of(inputs["position_ids"][0]),
        Documents.of([7, 1, 12], CPU),
        Arena(4 * (20 * planned(decoder, plan) + 64 * 20), torch.float32, CPU),
    )
    hidden_weights = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(2))[0]
    for _ in range(2):  # the second micro-batch takes the room of the first
        fast.zero_grad()
        with torch.no_grad():
            last, saved = decoder.forward_stack(decoder.embed_tokens(inputs["input_ids"][0]), row, plan)
            hidden = decoder.final_norm(last)
            decoder.adapter.prepare()
            decoder.backward_stack(hidden_weights, last, saved, row)
        assert row.arena.outside == 0
        assert torch.equal(hidden, plain[0][0])
        assert all(torch.equal(p.grad, plain[1][name]) for name, p in fast.named_parameters() if p.requires_grad)


def planned(decoder: Any, plan: list[Saving]) -> int:
    """Numbers a token that the planner expects in the arena; log-sum-exps and copies of t lie elsewhere."""
    return sum(saved_numbers(decoder.spec, saving, decoder.planner.extra) for saving in plan)


def test_low_memory(family_dir):
    """The embedding elsewhere, every layer recomputed: the same bits."""
    from transformers import AutoConfig

    folder = family_dir("llama")
    config = AutoConfig.from_pretrained(folder)
    assert not config.tie_word_embeddings
    found = []
    for low_memory in (False, True):
        weights = FolderWeights(folder, CPU, torch.float32)
        model = load_fast(weights, config, quantized=True, host_embedding=low_memory, recompute=low_memory)
        model = attach_lora(model, TUNING, 7)
        decoder = model.get_base_model().model
        decoder.bind()
        found.append(run(model.train(), packed_inputs()))
    assert isinstance(decoder.embed_tokens, HostEmbedding)
    assert decoder.planner.plan(20) == [Saving.RECOMPUTE] * 2
    assert decoder.planner.room(20) < 2 * 20 * 2 * 64 * 2 + 2**18
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    assert decoder.embed_tokens.to(torch.float16).weight.dtype == torch.float32  # it stays as and where it is


def test_the_planner_spends_what_there_is():
    spec = DecoderSpec("qwen3", 36, 4096, 12288, Heads(32, 8, 128), 151936, 1e-6, True, (False, False), False)
    gib = 2**30
    kept = [divide(spec, 2048, budget * gib, 2, 192).count(Saving.KEEP) for budget in (1, 2, 4, 6, 8)]
    assert kept == sorted(kept)
    assert kept[0] == 1
    assert kept[-1] == 36
    for budget in (2, 3, 4, 5, 6):
        plan = divide(spec, 2048, budget * gib, 2, 192)
        spent = sum(saved_numbers(spec, saving, 192) for saving in plan) * 2048 * 2
        assert 0.9 * budget * gib <= spent <= budget * gib
        assert plan[-1] is Saving.KEEP


def test_nf4(random_model_dir):
    standard, fast = both(random_model_dir, bits=4)
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


def test_padded_rows(random_model_dir):
    standard, fast = both(random_model_dir)
    ids = packed_inputs()["input_ids"].reshape(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "position_ids": torch.arange(10).expand(2, 10), "attention_mask": mask}
    same(run(fast, inputs), run(standard, inputs))


def test_some_targets_only(random_model_dir):
    tuning = TuningSettings(lora_r=4, lora_target="k_proj,up_proj,down_proj")
    standard, fast = both(random_model_dir, tuning=tuning)
    same(run(fast, packed_inputs()), run(standard, packed_inputs()))


def test_new_adapters_start_alike(random_model_dir):
    standard, fast = both(random_model_dir)
    ours, theirs = dict(fast.named_parameters()), dict(standard.named_parameters())
    trained = [name for name, p in theirs.items() if p.requires_grad]
    assert trained == [name for name, p in ours.items() if p.requires_grad]
    assert all(torch.equal(ours[name], theirs[name]) for name in trained)


def test_a_switched_off_adapter(random_model_dir):
    standard, fast = both(random_model_dir)
    outputs = []
    for model in (standard, fast):
        model.eval()
        with torch.no_grad(), model.disable_adapter():
            outputs.append(model.get_base_model().model(**packed_inputs(), use_cache=False).last_hidden_state)
    assert torch.allclose(*outputs, atol=1e-5)


def test_generation_with_a_cache(random_model_dir):
    from transformers import DynamicCache

    standard, fast = both(random_model_dir)
    ids = packed_inputs()["input_ids"].reshape(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    outputs = []
    for model in (standard.eval(), fast.eval()):
        inner, cache = model.get_base_model(), DynamicCache(config=model.get_base_model().config)
        with torch.no_grad():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            first = inner(
                input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, logits_to_keep=1
            ).logits
            longer = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
            second = inner(
                input_ids=ids[:, :1], position_ids=mask.sum(1, keepdim=True), attention_mask=longer,
                past_key_values=cache, logits_to_keep=1,
            ).logits  # fmt: skip
        outputs.append(torch.cat([first, second]))
    assert torch.allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize("chunk", [10**9, 4000])
def test_cross_entropy_of_the_head(chunk):
    from unsloth_factory.model.fast import head

    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(300, 16)
    targets = torch.randint(0, 300, (9,))
    (head.cross_entropy_sum(hidden, weight, targets, chunk) * 0.5).backward()
    again = hidden.detach().clone().requires_grad_()
    (torch.nn.functional.cross_entropy(again @ weight.t(), targets, reduction="sum") * 0.5).backward()
    assert torch.allclose(hidden.grad, again.grad, atol=1e-6)


def test_what_it_cannot_run_is_named():
    from transformers import AutoConfig

    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", **sizes, num_key_value_heads=2, head_dim=24)
    assert why_not(config) is None
    assert why_not(config, quantized=True) == "4-bit rows of 96, 192, 96 weights (multiples of 64 are needed)"
    assert why_not(AutoConfig.for_model("llama", **sizes, mlp_bias=True)) == "biases in the MLP"
    assert "model type gpt2" in str(why_not(AutoConfig.for_model("gpt2")))
    window = AutoConfig.for_model("mistral", **sizes, sliding_window=4096)
    assert "window of 4096 tokens" in str(why_not(window))


def test_rows_that_share_a_graph() -> None:
    """With attention that launches by tokens, rows of as many tokens do; else the longest document counts as well."""
    assert Bucket.of((300, 200)) == Bucket(512, 4, 512)
    assert Bucket.of((512,)) == Bucket(512, 2, 512)  # the second place is for padding
    assert Bucket.of((900, 600)) == Bucket(1536, 4, 1024)
    assert Bucket.of((1500,)) == Bucket(1536, 2, 1536)
    rows = [(900, 600), (1500,), (300,) * 5, (20, 1500)]
    assert len({Bucket.of(lengths) for lengths in rows}) == 4
    assert {Bucket.of(lengths, by_tokens=True) for lengths in rows} == {Bucket(1536, 8, 1536)}
    assert Bucket.of((100,) * 12, by_tokens=True) == Bucket(1280, 16, 1280)
