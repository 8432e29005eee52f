"""This project's engines and its rivals as what a benchmark trains: loaded, given micro-batches, updated.

Each is set up as its own users set it up: LoRA r = 16 on all linear layers of an NF4 base, AdamW 8 bit; in float16 with
a loss scaler. On a machine without a GPU all but Unsloth run in float32, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = ("fast", "standard")
THEIRS = ("unsloth", "liger", "transformers")
LOSS_CHUNK_GIB = 0.25


def cap(gib: float | None) -> None:
    """Let this process use no more of the card."""
    import torch

    if gib is not None and torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / total)


def driver_gib() -> float:
    """Memory of the card that is taken, but not by torch's allocator: the CUDA context, kernels, graphs."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)


def report(**figures: Any) -> None:
    """One line of JSON, also into $OUT/engine.jsonl."""
    import torch

    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "unsloth")
    found = {name: version(name) for name in packages if find_spec(name)}
    line = json.dumps(figures | {"gpu": gpu, "date": time.strftime("%Y-%m-%d"), "versions": found})
    print(line, flush=True)
    with open(Path(os.environ.get("OUT", ".")) / "engine.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def device() -> Any:
    """The GPU, or the CPU where there is none."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def dtype_of(given: argparse.Namespace) -> Any:
    """--dtype as torch's; float32 on a CPU."""
    import torch

    names = {"auto": "bfloat16"}
    return getattr(torch, names.get(given.dtype, given.dtype)) if torch.cuda.is_available() else torch.float32


def finish() -> None:
    """Wait for the GPU."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def empty() -> None:
    """Free what nothing refers to any more, and begin to watch the peak anew."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, float]:
    """GiB at most since `empty`."""
    import torch

    if not torch.cuda.is_available():
        return {"peak_gib": 0.0, "allocated_gib": 0.0}
    reserved, allocated = torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()
    return {"peak_gib": round(reserved / 2**30, 2), "allocated_gib": round(allocated / 2**30, 2)}


def import_libraries(rival: str) -> None:
    """Everything that loading and training need; Unsloth first of all: it patches what is imported later."""
    if rival == "unsloth":
        import unsloth  # noqa: F401
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    if rival in OURS:
        from unsloth_factory.model import load  # noqa: F401
        from unsloth_factory.training import optimizers  # noqa: F401
        from unsloth_factory.training.methods import Sft  # noqa: F401


class Peer:
    """Another library's model with its optimizer."""

    def __init__(self, given: argparse.Namespace, longest: int = 8192) -> None:
        import bitsandbytes
        import torch

        self.unsloth = given.rival == "unsloth"
        self.model = load_unsloth(given, longest) if self.unsloth else load_transformers(given)
        self.model.train()
        self.dtype = dtype_of(given)
        self.optimizer = bitsandbytes.optim.AdamW8bit([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)
        self.scaler = torch.amp.GradScaler(device().type, enabled=self.dtype == torch.float16)
        self.setting = f"checkpointing: {given.setting}"
        self.vocabulary = int(self.model.config.vocab_size)
        self.computed: dict[str, str] = {}
        self._watch_dtypes()

    def micro_batch(self, lengths: list[int]) -> None:
        """Forward and backward pass of samples padded to the longest of them, half of each trained."""
        import torch

        ids = torch.randint(0, min(120_000, self.vocabulary), (len(lengths), max(lengths)))
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for row, length in enumerate(lengths):
            mask[row, :length] = 1
            labels[row, length // 2 : length] = ids[row, length // 2 : length]
        ids, mask, labels = (x.to(device(), non_blocking=True) for x in (ids, mask, labels))
        with torch.autocast(device().type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(input_ids=ids, labels=labels, attention_mask=mask).loss
        self.scaler.scale(loss).backward()

    def update(self) -> None:
        """One step of the optimizer."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def clean(self) -> None:
        """Nothing is left of what was before, nor of half a step that failed."""
        self.optimizer.zero_grad(set_to_none=True)
        _forget_unscaling(self.scaler)
        empty()

    def begin(self) -> None:
        """Before something of another size."""
        if self.unsloth:
            self._loss_chunk(None)
        self.clean()

    def plan(self, tokens: int) -> dict[str, Any]:
        """Nothing: it does the same at every length."""
        return {}

    def reliefs(self) -> list[Callable[[], None]]:
        """What to do one after the other when memory runs out, before the size is called too long.

        Unsloth sizes the chunks of its loss by the card's free memory, of which the cap leaves it a tenth: it is given
        the chunks that it would take on a small card.
        """
        return [lambda: self._loss_chunk(LOSS_CHUNK_GIB)] if self.unsloth else []

    def _loss_chunk(self, gib: float | None) -> None:
        try:
            from unsloth_zoo.fused_losses import chunked_logprob
        except ImportError:  # an older zoo
            return
        if not hasattr(self, "_usual_chunk"):
            self._usual_chunk = chunked_logprob._CHUNK_GB
        chunked_logprob._CHUNK_GB = self._usual_chunk if gib is None else gib

    def _watch_dtypes(self) -> None:
        """Note in what the first layer computes at its first pass."""
        names = dict(self.model.named_modules())
        layer = next((m for name, m in names.items() if name.endswith("layers.0")), None)
        weight = next(
            (m.weight for name, m in names.items() if name.endswith("layers.0.mlp.down_proj.base_layer")), None
        )
        lora = next((p for name, p in self.model.named_parameters() if "lora_A" in name), None)
        state = getattr(weight, "quant_state", None)
        embedding = self.model.get_input_embeddings()
        self.computed = {
            "dequantised": str(getattr(state, "dtype", getattr(weight, "dtype", "?"))),
            "lora": str(getattr(lora, "dtype", "?")),
            "forced_float32": os.environ.get("UNSLOTH_FORCE_FLOAT32", "0"),
            "embedding_on": str(next((p.device for p in embedding.parameters()), "?")),
        }
        if layer is None:
            return

        def look(module: Any, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.computed["layer_output"] = str(first.dtype)
            handle.remove()

        handle = layer.register_forward_hook(look)


class Ours:
    """This project's model, loss and optimizer, as `uf sft` uses them, without its loop."""

    def __init__(self, given: argparse.Namespace, longest: int = 8192) -> None:
        import torch

        from unsloth_factory.config.settings import ModelSettings, TuningSettings
        from unsloth_factory.model.load import load_model
        from unsloth_factory.training.methods import Sft
        from unsloth_factory.training.optimizers import make_optimizer

        self.loaded = load_model(
            ModelSettings(model=str(given.model), engine=given.rival, low_memory=given.low_memory),
            quantization_bit=4, dtype=dtype_of(given), for_training=True, tuning=TuningSettings(lora_r=16),
        )  # fmt: skip
        self.fast, self.recomputes, self.offload = given.rival == "fast", given.low_memory, False
        self.dtype = self.loaded.dtype
        self.loaded.model.train()
        self.method = Sft()
        self.parameters = self.loaded.optimized_parameters()
        self.optimizer = make_optimizer("adamw_8bit", self.parameters, weight_decay=0.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-4
        self.scaler = torch.amp.GradScaler(device().type, enabled=self.dtype == torch.float16)
        self.setting = "--low_memory" if given.low_memory else "planner" if self.fast else "checkpointing"
        self.vocabulary = self.loaded.vocabulary
        self.computed = {"dequantised": str(self.dtype), "engine": self.loaded.engine}

    def micro_batch(self, lengths: list[int]) -> None:
        """Forward and backward pass of samples packed into one row, half of each trained."""
        import numpy as np

        from unsloth_factory.data.types import TokenSample
        from unsloth_factory.training.memory.offload import offloaded

        generator = np.random.default_rng(len(lengths))
        samples = [
            TokenSample(
                generator.integers(0, min(120_000, self.vocabulary), length).astype(np.int32),
                np.arange(length) >= length // 2,
                "made up",
            )
            for length in lengths
        ]
        batch = self.method.make_batch(samples, packing=True, pad_id=0)
        with offloaded(self.loaded) if self.offload else nullcontext():
            loss = self.method.loss(self.loaded, batch)
        self.scaler.scale(loss.total / loss.count).backward()

    def update(self) -> None:
        """One step of the optimizer, its gradient clipped."""
        import torch

        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def clean(self) -> None:
        """Nothing is left of what was before, nor of half a step that failed; graphs neither."""
        self.optimizer.zero_grad()
        _forget_unscaling(self.scaler)
        if self.fast and self.loaded.decoder.graphs is not None:
            self.loaded.decoder.graphs.drop()
        empty()

    def begin(self) -> None:
        """Before something of another size: a plan with all the memory that is there."""
        self.clean()
        self.offload = False
        if self.fast:
            planner = self.loaded.decoder.planner
            planner.budget, planner.offloads_all = None, False
            if not self.recomputes:
                planner.forced = None

    def plan(self, tokens: int) -> dict[str, Any]:
        """Of the fast engine: how many layers keep what at this length, and what it has pinned."""
        if not self.fast:
            return {}
        decoder = self.loaded.decoder
        plan = [saving.value for saving in decoder.planner.plan(-(-tokens // 128) * 128)]
        counts = {what: plan.count(what) for what in dict.fromkeys(plan)}
        return {"plan": counts, "pinned_gib": round(decoder.host_inputs.size / 2**30, 2)}

    def recompute_all(self) -> None:
        """From now on take as little memory as can be."""
        self.recomputes, self.setting = True, "every layer recomputed"
        self.loaded.recompute_layers()

    def reliefs(self) -> list[Callable[[], None]]:
        """What the training loop does when memory runs out: plan with less, recompute all, offload."""
        if self.fast:
            return [self.loaded.give_up_memory, self.loaded.recompute_layers, self.loaded.offload_layers]
        return [lambda: setattr(self, "offload", True)]


def _forget_unscaling(scaler: Any) -> None:
    """A scaler refuses to unscale twice between two updates, and the first of them may have failed."""
    if scaler.is_enabled():
        scaler._per_optimizer_states.clear()


def load(given: argparse.Namespace, longest: int = 8192) -> Any:
    """The rival named in `given`, ready to train samples of at most `longest` tokens."""
    return (Ours if given.rival in OURS else Peer)(given, longest)


def load_unsloth(given: argparse.Namespace, longest: int) -> Any:
    """Unsloth's model, as its notebooks set it up. It cuts samples that are longer than it was told."""
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        str(given.model), max_seq_length=longest, dtype=dtype_of(given), load_in_4bit=True, local_files_only=True
    )
    return FastLanguageModel.get_peft_model(
        model, r=16, target_modules=TARGETS, lora_alpha=16, lora_dropout=0, bias="none", random_state=3407,
        use_gradient_checkpointing="unsloth" if given.setting == "checkpointing" else False,
    )  # fmt: skip


def load_transformers(given: argparse.Namespace) -> Any:
    """Transformers + peft + bitsandbytes as LLaMA-Factory sets them up, with Liger's kernels for the rival "liger"."""
    import peft
    import transformers

    if given.rival == "liger":
        import liger_kernel.transformers as liger

        kind = json.loads((given.model / "config.json").read_text())["model_type"]
        getattr(liger, f"apply_liger_kernel_to_{kind}")()
    dtype = dtype_of(given)
    bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        given.model, quantization_config=bits, dtype=dtype, device_map={"": device()}, attn_implementation="sdpa"
    )
    model.enable_input_require_grads()
    if given.setting == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, lora)
