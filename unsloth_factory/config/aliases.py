"""Names that users bring from LLaMA-Factory and transformers, and what becomes of each.

A LLaMA-Factory YAML runs as it is: keys that mean the same are mapped, keys that change nothing here are listed once
with the reason, and every other key is refused.
"""

from __future__ import annotations

ALIASES = {
    "model_name_or_path": "model",
    "adapter_name_or_path": "adapter",
    "default_system": "system",
    "cutoff_len": "max_seq_length",
    "max_length": "max_seq_length",
    "lora_rank": "lora_r",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation_steps",
    "num_train_epochs": "epochs",
    "lora_target_modules": "lora_target",
    "freeze_trainable_layers": "freeze_last_n",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    "val_size": "val_split",
    "optim": "optimizer",
    "pref_beta": "beta",
    "dataloader_num_workers": "dataloader_workers",
    "disable_gradient_checkpointing": "no_gradient_checkpointing",
    "formatting": "dataset_format",
    "infer_dtype": "dtype",
    "export_dir": "output",
    "early_stopping_steps": "early_stopping_patience",
    "early_stopping_threshold": "early_stopping_min_delta",
    "metric_for_best_model": "metric_for_best",
    "load_best_model_at_end": "load_best",
    "stage": "method",  # of `uf plan`; elsewhere it must agree with the command
}

# LLaMA-Factory's `max_samples` limits the data of a training; in `validate` it is a flag of its own.
TRAINING_ALIASES = {"max_samples": "data_limit"}

VALUE_ALIASES = {
    "optimizer": {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw": "paged_adamw_8bit",
    },
    "lora_target": {"all-linear": "all"},
    "lr_scheduler_type": {"constant_with_warmup": "constant"},
    "metric_for_best": {
        "eval_loss": "loss",
        "eval_exact_match": "exact_match",
        "eval_rewards/accuracies": "rewards/accuracies",
        "eval_rewards/margins": "rewards/margins",
    },
}

NO_EFFECT = {
    "template": "the model's own chat template is always used",
    "do_train": "the command says it",
    "do_eval": "the held-out split is evaluated whenever there is one",
    "bf16": "precision follows the card's compute capability",
    "fp16": "precision follows the card's compute capability; --dtype float16 asks for float16 on any card",
    "pure_bf16": "precision follows the card's compute capability",
    "plot_loss": "the loss is always plotted",
    "overwrite_cache": "there is no data cache to go stale",
    "preprocessing_num_workers": "the tokenizer works in one process",
    "ddp_timeout": "one process",
    "flash_attn": "the attention kernel follows the card",
    "quantization_method": "4 bit is NF4 through bitsandbytes",
    "bnb_4bit_use_double_quant": "double quantisation is always on",
    "double_quantization": "double quantisation is always on",
    "trust_remote_code": "code from model folders is never run",
    "eval_strategy": "--eval_steps decides",
    "evaluation_strategy": "--eval_steps decides",
    "save_strategy": "--save_steps decides",
    "per_device_eval_batch_size": "evaluation uses --batch_size",
    "save_only_model": "checkpoints are always complete, so that they can be resumed",
    "greater_is_better": "each metric knows which way is better",
    "logging_dir": "metrics.jsonl lies in the run folder",
    "neat_packing": "packing is always document-correct",
    "packing": "packing is on; --no_packing pads instead",
    "export_size": "--max_shard_size decides",
    "export_device": "merging runs on the CPU",
    "export_legacy_format": "weights are always safetensors",
    "include_num_input_tokens_seen": "metrics.jsonl counts tokens",
}

# `stage:` of a LLaMA-Factory file must agree with the command.
STAGES = {"sft": "sft", "dpo": "dpo"}
