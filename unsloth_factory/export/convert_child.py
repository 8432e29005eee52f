"""The child process in which llama.cpp's own converter runs, with its own gguf-py and without remote code.

The converter asks transformers with trust_remote_code=True in many places, and then runs Python from the model folder.
Here, in a process of its own, transformers is told False whatever it asks.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from unsloth_factory.config.errors import UserError
from unsloth_factory.inference.child import serve


def _refuse_remote_code() -> None:
    import transformers
    import transformers.dynamic_module_utils

    def guarded(original: Callable) -> Callable:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **{**kwargs, "trust_remote_code": False})

        return call

    for name in ("AutoTokenizer", "AutoConfig", "AutoModel", "AutoModelForCausalLM"):
        automatic = getattr(transformers, name, None)
        if automatic is not None:
            automatic.from_pretrained = guarded(automatic.from_pretrained)

    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise UserError(f"the model folder's own Python code ({name}) is never run; use a model that needs none.")

    # All of transformers' remote code, of whatever class, is imported by this one function.
    transformers.dynamic_module_utils.get_class_in_module = refuse  # type: ignore[assignment]


def _import_converter(folder: str) -> ModuleType:
    """The `conversion` package of newer trees, or the script of older ones; their gguf-py comes first."""
    sys.path[:0] = [folder, str(Path(folder) / "gguf-py")]
    _refuse_remote_code()
    try:
        return importlib.import_module("conversion")
    except ModuleNotFoundError as error:
        if error.name != "conversion":
            raise
        return importlib.import_module("convert_hf_to_gguf")


def _model_class(module: ModuleType, model: Path) -> Any:
    try:
        hparams = module.ModelBase.load_hparams(model, False)
    except TypeError:  # older trees know no second argument
        hparams = module.ModelBase.load_hparams(model)
    architecture = module.get_model_architecture(hparams, module.ModelType.TEXT)
    try:
        if hasattr(module, "get_model_class"):
            return module.get_model_class(architecture, mmproj=False)
        return module.ModelBase.from_model_architecture(architecture, model_type=module.ModelType.TEXT)
    except NotImplementedError:
        raise UserError(f"llama.cpp's converter does not know the architecture {architecture} of {model}.") from None


class Converter:
    """State between the two requests: the converter's modules and the chosen pre-tokenizer."""

    def open(self, request: dict, _: Callable) -> dict:
        """Import the converter, find the model class, settle the pre-tokenizer. No weight is read."""
        self.module = _import_converter(request["converter"])
        self.model = Path(request["model"])
        self.model_class = _model_class(self.module, self.model)
        name = None
        if request["byte_level_bpe"]:
            name = self._settle_pre_tokenizer(request["fallback"], request["reason"])
        return {"pre_tokenizer": name, "architecture": self.model_class.__name__}

    def _settle_pre_tokenizer(self, fallback: str | None, reason: str) -> str:
        """The converter knows tokenizers by a hash of token ids; a vocabulary of one's own is never among them."""
        from transformers import AutoTokenizer

        recognise = self.model_class.get_vocab_base_pre
        try:
            return recognise(None, AutoTokenizer.from_pretrained(str(self.model)))
        except NotImplementedError:
            if fallback is None:
                raise UserError(
                    f"{self.model}: llama.cpp's converter does not recognise the tokenizer, and its pre-tokenizer is "
                    f"none of those known here ({reason}). No weight was read. Use a newer llama.cpp with --llama_cpp "
                    "DIR, or train on a base whose tokenizer llama.cpp knows."
                ) from None
        self.model_class.get_vocab_base_pre = lambda _, tokenizer: fallback
        return fallback

    def convert(self, request: dict, _: Callable) -> dict:
        """Write the GGUF file."""
        import gguf
        import torch

        names = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
        file_type = getattr(gguf.LlamaFileType, names[request["outtype"]])
        with torch.inference_mode():
            self.model_class(self.model, file_type, Path(request["outfile"]), model_name=request["name"]).write()
        return {}


def main() -> None:
    """Serve until the parent closes the pipe."""
    converter = Converter()
    serve({"open": converter.open, "convert": converter.convert})


if __name__ == "__main__":
    main()
