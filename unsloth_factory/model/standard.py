"""The `standard` engine: transformers, with bitsandbytes' NF4 when asked, on a CPU or one GPU.

NF4 with double quantisation: Dettmers et al. 2023, arXiv 2305.14314. Every linear layer but the output head is
quantised, one at a time while the file is read, so that the 16-bit weights never lie in memory together. Embeddings,
head and norms keep the computation dtype: casting them to float32, as peft's prepare_model_for_kbit_training does,
would take another 2.5 GiB for Qwen3-8B and gain nothing, because the norms compute in float32 anyway.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unsloth_factory.config.errors import UserError
from unsloth_factory.model.attention import attention_for
from unsloth_factory.model.foreign_code import require_language_model
from unsloth_factory.model.noise import quiet_libraries
from unsloth_factory.model.weight_files import read_json


def is_prequantized(folder: Path) -> bool:
    """Whether the folder stores bitsandbytes 4-bit weights."""
    return "quantization_config" in read_json(folder / "config.json")


def nf4_config(dtype: torch.dtype) -> Any:
    """How a 16-bit base is quantised: NF4, blocks of 64 weights, double quantisation."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def load_base(folder: Path, *, quantization_bit: int | None, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the weights onto one device.

    Args:
        folder: Checked model folder.
        quantization_bit: 4 quantises to NF4; a folder that stores 4-bit weights is 4-bit in any case.
        device: Where the weights go.
        dtype: Format of what is not quantised, and of the computation.

    Returns:
        transformers' causal language model in evaluation mode; nothing trains yet.

    Raises:
        UserError: transformers does not know the architecture, or the weights do not fit config.json.
    """
    from transformers import AutoModelForCausalLM

    require_language_model(folder)
    auto: Any = AutoModelForCausalLM
    options: dict[str, Any] = {}
    if quantization_bit is not None and not is_prequantized(folder):
        options["quantization_config"] = nf4_config(dtype)
    with quiet_libraries():
        try:
            model, info = auto.from_pretrained(
                str(folder),
                dtype=dtype,
                device_map={"": device if device.type == "cpu" else device.index or 0},
                attn_implementation=attention_for(device),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (ValueError, KeyError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(f"--model {folder} cannot be loaded by transformers: {error}") from error
    _check_loaded(folder, info)
    _settle_linear4bit(model, dtype)
    return model.eval().requires_grad_(False)


def _check_loaded(folder: Path, info: dict[str, Any]) -> None:
    """A missing tensor would be left random, with no more than a warning."""
    for key, verb in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape")):
        if info.get(key):
            names = sorted(str(name) for name in info[key])
            raise UserError(
                f"--model {folder}: the weights file {verb} {len(names)} of the tensors that config.json asks for, "
                f"such as {names[0]}. Copy the folder again, config.json included."
            )


def _settle_linear4bit(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Make every 4-bit layer compute in `dtype`, in training and in generation alike.

    A pre-quantised folder brings the dtype of its maker. And on CPUs with AVX512-BF16 bitsandbytes repacks a weight in
    place at the first pass without gradients, and rounds to bfloat16 there: the same model would then answer
    differently from how it was trained.
    """
    module: Any
    for module in model.modules():
        if module.__class__.__name__ == "Linear4bit":
            module.compute_dtype = dtype
            module.compute_type_is_set = True
            module.support_avx512bf16_for_cpu = False


def load_tokenizer(folder: Path) -> Any:
    """The folder's own tokenizer.

    Raises:
        UserError: Its files cannot be read.
    """
    from transformers import AutoTokenizer

    with quiet_libraries():
        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"--model {folder}: its tokenizer cannot be loaded: {error}") from error
