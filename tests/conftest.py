"""Shared fixtures: tiny models, a byte-level tokenizer, the real data when it lies beside the checkout."""

from __future__ import annotations

import os
import runpy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
# No test reaches the network, nor does a process that one starts (the folder holds a sitecustomize.py).
GUARD = str(ROOT / "tests" / "network_guard")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [GUARD, os.environ.get("PYTHONPATH")]))
os.environ["UNSLOTH_FACTORY_NETWORK_LOG"] = str(Path(tempfile.mkdtemp()) / "attempts.txt")
runpy.run_path(str(Path(GUARD) / "sitecustomize.py"))
BUNDLED = ROOT / "unsloth_factory" / "assets" / "tiny_model"
CORPUS = [
    "请问高血压患者平时需要注意什么？应低盐饮食，按时服药，并定期测量血压。",
    "What should a patient with diabetes avoid? Sugar, and missed doses.",
    "发热超过三天应及时就医。不要自行加大剂量。一、二、三、四、五。",
    "The quick brown fox jumps over the lazy dog. 0123456789 system user assistant think",
] * 4
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(autouse=True)
def network_attempts() -> Iterator[Path]:
    """Fail the test that tried to leave this machine; gives the file in which attempts are written down."""
    log = Path(os.environ["UNSLOTH_FACTORY_NETWORK_LOG"])
    yield log
    if log.is_file():
        attempts = log.read_text(encoding="utf-8")
        log.unlink()
        pytest.fail(f"the network was tried:\n{attempts}")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data beside the checkout; a test that wants it is skipped where it is not."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("the real data of ../shared/data is not here")
    return path


def train_tokenizer(vocab_size: int = 600):
    """A byte-level BPE with Qwen2's split pattern and ChatML's control tokens, trained on four sentences."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def make_random_model(folder: Path, *, family: str = "qwen3", layers: int = 2, hidden: int = 64) -> Path:
    """Write a random model of one family with the tokenizer above and the bundled chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = train_tokenizer()
    tokenizer.chat_template = (BUNDLED / "chat_template.jinja").read_text(encoding="utf-8")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "initializer_range": 0.08,
    }
    if family in ("qwen3", "mistral", "llama"):
        sizes["head_dim"] = hidden // 4
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-layer random Qwen3 of hidden size 64."""
    return make_random_model(tmp_path_factory.mktemp("random_model"))


@pytest.fixture(scope="session")
def tiny_model_dir() -> Path:
    """The bundled model."""
    assert (BUNDLED / "model.safetensors").is_file(), "the bundled model is missing: scripts/make_bundled_model.py"
    return BUNDLED


@pytest.fixture(scope="session")
def tiny_ggufs(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model as f16, q8_0 and q4_0 files in one folder, by type."""
    from unsloth_factory.export.gguf import GgufOptions, convert
    from unsloth_factory.export.quantize import quantize

    folder = tmp_path_factory.mktemp("tiny_gguf")
    source = convert(tiny_model_dir, folder / "tiny-f16.gguf", GgufOptions(check=False)).path
    made = quantize(source, folder, ["q8_0", "q4_0"], threads=1)
    return {"f16": source, **{result.figures["type"]: result.path for result in made}}


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of three layers; its tokenizer names no longest text, as some published ones do not."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    letters = [chr(code) for code in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(0x4E00, 0x4E40)), *letters]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"##{letter}" for letter in letters)]), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    size = len(words) + len(letters)
    BertModel(BertConfig(vocab_size=size, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder
