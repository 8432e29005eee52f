"""Sizes of a model from its config.json alone: no weights, no table of model names.

The four families share one layer: seven linear layers, two RMSNorms, and with Qwen3 a norm on every query and key head.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.paths import TINY_FOLDER, TINY_NAME, TOKENIZER_FILES, is_hub_id
from unsloth_factory.model.weight_files import read_json

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SMALL_FILES = ["config.json", "tokenizer*", "vocab*", "merges.txt", "*.jinja", "generation_config.json"]


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: [out_features, in_features], with a bias or without."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def weights(self) -> int:
        """Entries of the matrix, without the bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class ModelShape:
    """Every size that memory and time depend on."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    """The output head shares its matrix with the embedding."""
    qkv_bias: bool = False
    output_bias: bool = False
    """The attention's output projection has a bias."""
    mlp_bias: bool = False
    head_norms: bool = False
    """RMSNorm on the heads of queries and keys (Qwen3)."""
    max_positions: int = 2**31
    sliding_window: int | None = None
    """Longer rows than this get a dense mask in some layers."""
    prequantized: bool = False
    """The folder stores bitsandbytes 4-bit weights."""

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    def linears(self) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer, in the order in which they compute."""
        h, i, q, kv = self.hidden, self.intermediate, self.query_width, self.kv_width
        return (
            LinearShape("q_proj", h, q, self.qkv_bias),
            LinearShape("k_proj", h, kv, self.qkv_bias),
            LinearShape("v_proj", h, kv, self.qkv_bias),
            LinearShape("o_proj", q, h, self.output_bias),
            LinearShape("gate_proj", h, i, self.mlp_bias),
            LinearShape("up_proj", h, i, self.mlp_bias),
            LinearShape("down_proj", i, h, self.mlp_bias),
        )

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices of one decoder layer."""
        return sum(linear.weights for linear in self.linears())

    @property
    def layer_vectors(self) -> int:
        """Biases and norms of one decoder layer."""
        biases = sum(linear.out_features for linear in self.linears() if linear.bias)
        return biases + 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)

    @property
    def embedding(self) -> int:
        """Entries of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Entries of the output head; 0 when it is the embedding."""
        return 0 if self.tied else self.vocabulary * self.hidden

    def parameters(self) -> dict[str, int]:
        """Parameters by part; tied weights count once."""
        return {
            "embedding": self.embedding,
            "layer matrices": self.layers * self.layer_weights,
            "layer biases and norms": self.layers * self.layer_vectors,
            "final norm": self.hidden,
            "output head": self.head,
        }

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters().values())

    def targets(self, lora_target: str) -> tuple[LinearShape, ...]:
        """The linear layers of one decoder layer that get LoRA matrices.

        Raises:
            UserError: A name that no linear layer has.
        """
        if lora_target.strip() in ("all", "all-linear"):
            return self.linears()
        wanted = {name.strip() for name in lora_target.split(",") if name.strip()}
        known = {linear.name for linear in self.linears()}
        if not wanted or wanted - known:
            named = ", ".join(sorted(wanted - known)) or lora_target
            raise UserError(f"--lora_target {named}: no linear layer has that name. Known: all, {', '.join(known)}.")
        return tuple(linear for linear in self.linears() if linear.name in wanted)


def read_shape(path: Path) -> ModelShape:
    """Sizes from a config.json.

    Raises:
        UserError: The file cannot be read, a size is missing or is no whole number, or the family is not known here.
    """
    config = read_json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{path}: model_type is {family}; the sizes of its parts are not known here. Known: {', '.join(FAMILIES)}."
        )
    heads = _size(config, "num_attention_heads", path)
    hidden = _size(config, "hidden_size", path)
    # Where config.json is silent transformers fills in its class's own value.
    kv_heads = {"llama": heads, "mistral": 8}.get(family, 32)
    head_dim = 128 if family == "qwen3" else hidden // heads
    bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family=family,
        layers=_size(config, "num_hidden_layers", path),
        hidden=hidden,
        intermediate=_size(config, "intermediate_size", path),
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", path, kv_heads if "num_key_value_heads" not in config else heads),
        head_dim=_size(config, "head_dim", path, head_dim),
        vocabulary=_size(config, "vocab_size", path),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and bias),
        output_bias=family in ("llama", "qwen3") and bias,
        mlp_bias=family == "llama" and bool(config.get("mlp_bias", False)),
        head_norms=family == "qwen3",
        max_positions=_size(config, "max_position_embeddings", path, 2**31),
        sliding_window=_window(config, family),
        prequantized="quantization_config" in config,
    )


def _size(config: dict[str, Any], key: str, path: Path, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{path}: {key} is {value!r}; a whole number of at least 1 is needed to size the model.")
    return value


def _window(config: dict[str, Any], family: str) -> int | None:
    """Sliding window that some layer uses. Mistral's class has one of 4,096 where config.json does not say null."""
    if family == "mistral":
        return config.get("sliding_window", 4096)
    used = family.startswith("qwen") and config.get("use_sliding_window", False)
    return config.get("sliding_window", 4096) if used else None


def find_config(name: str | None, hub: str = "hf") -> Path:
    """The config.json of what --model names: a file, a folder, "tiny", or a hub id (then the small files are fetched).

    Raises:
        UserError: Nothing of that name.
    """
    if not name:
        raise UserError('--model is missing. Give a model folder, its config.json, a hub id, or "tiny".')
    path = Path(name).expanduser()
    if name == TINY_NAME and not path.is_dir():
        path = TINY_FOLDER
    if path.is_file():
        return path
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"--model {name} has no config.json: it is not a model folder in the Hugging Face layout.")
        return path / "config.json"
    if is_hub_id(name):
        return _from_hub(name, hub)
    raise UserError(f"--model {name}: no such file or folder. Give a model folder, its config.json, or a hub id.")


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder can tokenise a dataset."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _from_hub(name: str, hub: str) -> Path:
    """config.json and the tokenizer of a hub id, never the weights."""
    try:
        if hub == "modelscope":
            from modelscope import snapshot_download  # type: ignore[import-not-found]
        else:
            from huggingface_hub import snapshot_download
        return Path(snapshot_download(name, allow_patterns=SMALL_FILES)) / "config.json"
    except Exception as error:  # the hubs' own and requests' exceptions share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model {name}: no folder of that name here, and its config.json cannot be fetched: {reason} Check the "
            "name and the connection, or give a folder or a config.json."
        ) from error
