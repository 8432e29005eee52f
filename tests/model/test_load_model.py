from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from unsloth_factory.config.errors import UsageError, UserError
from unsloth_factory.config.settings import ModelSettings, TuningSettings
from unsloth_factory.model import device as device_module
from unsloth_factory.model.device import default_quantization, pick_device_dtype
from unsloth_factory.model.load import limit_memory, load_model

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
FIRST, SECOND = [5, 9, 40, 77, 3, 21, 8], [60, 2, 33, 90, 14]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [None, 4])
def test_questions_that_the_other_stages_ask(family, bits, family_dir, load, row):
    loaded = load(family_dir(family), quantization_bit=bits)
    ids, positions = row(FIRST)
    with torch.no_grad():
        states = loaded.hidden_states(ids, positions, None)
        logits = loaded.lm_head(states)
        reference = loaded.model(input_ids=ids).logits
    assert states.shape == (1, len(FIRST), 64)
    torch.testing.assert_close(logits, reference, atol=1e-5, rtol=1e-5)
    assert loaded.max_positions == 1024
    assert loaded.quantized is (bits == 4)
    assert loaded.trainable_parameters() == []
    stored = load_file(family_dir(family) / "model.safetensors")
    assert loaded.parameter_counts() == (0, sum(tensor.numel() for tensor in stored.values()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_do_not_see_each_other(family, checkpointing, family_dir, load, row, stir):
    loaded = stir(load(family_dir(family), for_training=True))
    loaded.set_gradient_checkpointing(checkpointing)
    loaded.model.train()
    packed = loaded.hidden_states(*row(FIRST, SECOND), None)
    alone = loaded.hidden_states(*row(SECOND), None)
    torch.testing.assert_close(packed[:, len(FIRST) :], alone, atol=1e-5, rtol=1e-5)
    changed = loaded.hidden_states(*row([11, *FIRST[1:]], SECOND), None)
    assert not torch.equal(changed[:, : len(FIRST)], packed[:, : len(FIRST)])
    torch.testing.assert_close(changed[:, len(FIRST) :], packed[:, len(FIRST) :], atol=1e-6, rtol=0)


def test_right_padding_changes_nothing(load, row):
    loaded = load()
    ids, positions = row(SECOND)
    padded = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    with torch.no_grad():
        states = loaded.hidden_states(padded, torch.arange(padded.shape[1])[None], mask)
        alone = loaded.hidden_states(ids, positions, None)
    torch.testing.assert_close(states[:, : len(SECOND)], alone, atol=1e-5, rtol=1e-5)


def test_checkpointing_gives_the_same_gradients(load, row, stir):
    gradients = []
    for enabled in (False, True):
        loaded = stir(load(for_training=True))
        loaded.set_gradient_checkpointing(enabled)
        loaded.model.train()
        loaded.hidden_states(*row(FIRST), None).square().sum().backward()
        gradients.append([parameter.grad for parameter in loaded.trainable_parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_generation_defaults(load):
    loaded = load()
    assert loaded.generation_defaults["eos_token_id"] == [
        loaded.tokenizer.eos_token_id,
        loaded.tokenizer.pad_token_id,
    ]


@pytest.mark.parametrize("engine", ["unsloth"])
def test_engine_that_is_not_here_is_an_error(engine):
    with pytest.raises(UsageError, match=rf"--engine {engine}: not in this version.*--engine standard"):
        load_model(ModelSettings(model="tiny", engine=engine))


def test_max_memory(monkeypatch, random_model_dir):
    settings = ModelSettings(model=str(random_model_dir), max_memory=2 * 2**30)
    assert any("--max_memory" in note for note in load_model(settings, device=torch.device("cpu")).notes)
    asked = []
    properties = type("Properties", (), {"total_memory": 4 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: asked.append(given))
    card = torch.device("cuda", 0)
    assert limit_memory(2 * 2**30, card) == []
    assert asked == [(0.5, card)]
    with pytest.raises(UsageError, match=r"--max_memory 5.0GiB: the GPU has 4.0 GiB"):
        limit_memory(5 * 2**30, card)


def test_auto_says_why(load):
    loaded = load()
    assert loaded.engine == "standard"
    assert "transformers" in loaded.engine_reason
    assert "float32" in loaded.device_reason


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_base_with_a_value_that_is_no_number_is_refused(copy_model, load, bits, value):
    folder = copy_model()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load(folder, quantization_bit=bits)


def test_large_sound_values_are_not_mistaken(tmp_path):
    from unsloth_factory.model.finite import refuse_nonfinite

    tensors = {"a": torch.full((4,), 3e38), "b": torch.ones(3, dtype=torch.int32), "c": torch.ones(0)}
    save_file(tensors, tmp_path / "x.safetensors")
    refuse_nonfinite([tmp_path / "x.safetensors"])


def test_missing_tensor_is_an_error_not_random(copy_model, load):
    folder = copy_model()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of the tensors.*q_proj"):
        load(folder)


def test_tensor_of_another_shape(copy_model, load, edit_json):
    folder = copy_model()
    edit_json(folder / "config.json", intermediate_size=192)
    with pytest.raises(UserError, match=r"cannot be loaded|in another shape"):
        load(folder)


def test_unknown_architecture(copy_model, load, edit_json):
    folder = copy_model()
    edit_json(folder / "config.json", model_type="no_such_model")
    with pytest.raises(UserError, match="no_such_model.* is no causal language model"):
        load(folder)


def test_broken_tokenizer(copy_model, load):
    folder = copy_model()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        load(folder)


def test_out_of_memory_says_what_to_do(monkeypatch, load):
    def fail(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("unsloth_factory.model.load.load_base", fail)
    with pytest.raises(UserError, match="does not fit on cpu.*--quantization_bit 4"):
        load()


@pytest.mark.parametrize(
    ("capability", "dtype", "word"), [((7, 5), torch.float16, "float16"), ((9, 0), torch.bfloat16, "bfloat16")]
)
def test_the_compute_capability_decides(a_gpu_of, capability, dtype, word):
    a_gpu_of(capability)
    device, picked, reason = pick_device_dtype()
    assert (device.type, picked) == ("cuda", dtype)
    assert word in reason


@pytest.fixture
def a_gpu_of(monkeypatch):
    """a_gpu_of((7, 5)): torch believes in a GPU of that compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        cuda = device_module.torch.cuda
        monkeypatch.setattr(cuda, "is_available", lambda: True)
        monkeypatch.setattr(cuda, "device_count", lambda: 1)
        monkeypatch.setattr(cuda, "get_device_capability", lambda _device: capability)
        monkeypatch.setattr(cuda, "get_device_name", lambda _device: "Test GPU")
        monkeypatch.setattr(cuda, "is_bf16_supported", lambda *_args: True)

    return pretend


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_float16_can_be_asked_for(a_gpu_of, capability):
    a_gpu_of(capability)
    _, picked, reason = pick_device_dtype("float16")
    assert picked == torch.float16
    assert "loss scaling as asked for" in reason


def test_bfloat16_is_refused_where_there_are_no_units(a_gpu_of):
    a_gpu_of((9, 0))
    assert pick_device_dtype("bfloat16")[1] == torch.bfloat16
    a_gpu_of((7, 5))
    message = r"--dtype bfloat16: Test GPU \(compute capability 7.5\) has no bfloat16 units .* Use --dtype float16"
    with pytest.raises(UsageError, match=message):
        pick_device_dtype("bfloat16")


def test_the_asked_dtype_reaches_the_loader(random_model_dir, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings, tuning = ModelSettings(model=str(random_model_dir)), TuningSettings(dtype="float16")
    with pytest.raises(UsageError, match="--dtype float16: no CUDA GPU was found, and the CPU computes in float32"):
        load_model(settings, for_training=True, tuning=tuning)
    assert load_model(settings, tuning=tuning).dtype == torch.float32  # it is about training alone


@pytest.mark.parametrize(
    ("settings", "device", "bits"),
    [
        ({}, "cuda", 4),
        ({}, "cpu", None),
        ({"quantization_bit": 4}, "cpu", 4),
        ({"no_quantization": True}, "cuda", None),
        ({"finetuning_type": "full"}, "cuda", None),
    ],
)
def test_default_quantization(settings, device, bits):
    assert default_quantization(TuningSettings(**settings), torch.device(device)) == bits
