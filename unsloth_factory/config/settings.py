"""Every setting of every command, grouped by what it decides. No torch here.

A command's settings are one frozen dataclass in `commands.py` beside this file, made of the groups below. Field names
are the flags (`--max_seq_length`, `--max-seq-length`) and the YAML keys; the text under a field is its help.
Checks of one group live in its `__post_init__`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from unsloth_factory.config.errors import UsageError, require
from unsloth_factory.config.values import Bytes, Seconds

Engine = Literal["auto", "fast", "unsloth", "standard"]
Matmul = Literal["exact", "fp8"]
FinetuningType = Literal["lora", "full", "freeze"]
SchedulerType = Literal["cosine", "linear", "constant"]
OptimizerType = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
LongSamples = Literal["shorten_prompt", "drop"]
BadRows = Literal["auto", "skip", "refuse"]
DuplicateRows = Literal["keep", "drop", "drop_near"]
LeakingRows = Literal["warn", "drop", "refuse"]
BaseWeights = Literal["auto", "as_trained", "original"]
BestMetric = Literal[
    "loss", "exact_match", "term_coverage", "association_coverage", "rewards/accuracies", "rewards/margins"
]
ANSWER_METRICS = ("exact_match", "term_coverage", "association_coverage")
FEWEST_SCORED = 8
"""Generated answers from which a share is worth printing."""
GateMeasure = Literal["kl", "perplexity", "accuracy"]
Forgetting = Literal["warn", "stop", "replay", "off"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which weights, and how they are loaded."""

    model: str | None = None
    """Model folder, "tiny" (the bundled model), or a hub id such as Qwen/Qwen3-8B (then it is downloaded)."""
    adapter: str | None = None
    """Folder of a PEFT adapter to load on the model."""
    hub: Literal["hf", "modelscope"] = "hf"
    """Where a hub id is looked up."""
    engine: Engine = "auto"
    """Which implementation runs the model; auto prints its choice and the reason."""
    matmul: Matmul = "exact"
    """Products with frozen 4-bit weights; fp8 (RTX 40, H100 and later) is not exact, and says how far off it is."""
    low_memory: bool = False
    """Take as little GPU memory as --engine fast can: the embedding stays in the CPU's, every layer is recomputed."""
    max_memory: Bytes | None = None
    """Most GPU memory that this process may take, such as 14.5GiB; 1.5 GiB is the least."""
    chat_template: str | None = None
    """Chat template for a base model without one: a built-in name (chatml) or a Jinja file."""

    def __post_init__(self) -> None:
        require(not self.low_memory or self.engine == "fast", "low_memory", "true", "needs --engine fast.")
        require(self.matmul == "exact" or self.engine == "fast", "matmul", self.matmul, "needs --engine fast.")
        least = 3 * 2**29
        require(self.max_memory is None or self.max_memory >= least, "max_memory", self.max_memory, "at least 1.5GiB.")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which files become samples, and how."""

    dataset: str | None = None
    """File, folder, names of dataset_info.json, or several by commas; `file.jsonl#500` takes the first 500 rows."""
    dataset_dir: str | None = None
    """Folder of dataset_info.json (LLaMA-Factory's registry) and of relative file names."""
    dataset_format: str = "auto"
    """Shape of the rows; auto looks at the column names."""
    columns: dict[str, str] | None = None
    """Other column names, role=column: `prompt=ask,response=answer`."""
    domain: str | None = None
    """Domain pack: medical, legal, psychology, exam, or a YAML file. Its system prompt and terms are used."""
    system: str | None = None
    """System prompt of rows without one. Default: the domain pack's."""
    max_seq_length: int = 2048
    """Longest sample, tokens."""
    long_samples: LongSamples = "shorten_prompt"
    """What happens to longer ones. The answer's end is never cut."""
    data_limit: int | None = None
    """Take the first N samples."""
    val_split: float = 0.05
    """Held out for evaluation: a share below 1, or a number of samples; 0 holds out none."""
    eval_dataset: str | None = None
    """Evaluation samples from a file of their own instead of --val_split."""
    encoding: str = "auto"
    """Text encoding of the files; auto detects UTF-8, GBK, GB18030, and UTF-16 with its mark."""
    bad_rows: BadRows = "auto"
    """Rows that cannot be used: auto leaves them out and counts them, but refuses a file with broken lines; skip leaves
    these out too, and answers that repeat the question; refuse takes no file with any."""
    duplicates: DuplicateRows = "keep"
    """Rows that repeat an earlier one: keep only counts them, drop leaves out exact repeats, drop_near also those that
    differ in case, blanks or a few characters."""
    leakage: LeakingRows = "warn"
    """Training rows that give held-out samples away: warn names each, drop leaves them out of the training, refuse
    stops."""

    def __post_init__(self) -> None:
        require(self.max_seq_length >= 16, "max_seq_length", self.max_seq_length, "at least 16 tokens")
        require(self.data_limit is None or self.data_limit >= 1, "data_limit", self.data_limit, "at least 1")
        require(self.val_split >= 0, "val_split", self.val_split, "0, a share below 1, or a number of samples")


@dataclass(frozen=True, kw_only=True)
class TuningSettings:
    """Which parameters train."""

    finetuning_type: FinetuningType = "lora"
    """lora, full, or freeze (only the last layers train)."""
    quantization_bit: Literal[4] | None = None
    """4 loads the frozen base in NF4 with double quantisation (QLoRA). Default: 4 on a GPU, none on a CPU."""
    lora_r: int = 16
    """Rank of the LoRA matrices."""
    lora_alpha: float = 32.0
    """LoRA scale times rank."""
    lora_dropout: float = 0.0
    """Dropout on the LoRA input."""
    lora_target: str = "all"
    """Modules by name, comma-separated, or all linear layers but the head."""
    freeze_last_n: int = 2
    """Layers that train with --finetuning_type freeze."""
    no_quantization: bool = False
    """Keep the base in 16 bit on a GPU (LoRA instead of QLoRA)."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """What a GPU computes in; auto takes bfloat16 from compute capability 8.0 on, float16 with loss scaling below."""

    def __post_init__(self) -> None:
        require(self.lora_r >= 1, "lora_r", self.lora_r, "at least 1")
        require(0 <= self.lora_dropout < 1, "lora_dropout", self.lora_dropout, "from 0 to below 1")
        require(self.freeze_last_n >= 1, "freeze_last_n", self.freeze_last_n, "at least 1")
        if self.quantization_bit and self.finetuning_type != "lora":
            raise UsageError(
                f"--quantization_bit {self.quantization_bit} with --finetuning_type {self.finetuning_type}: "
                "4-bit weights cannot train themselves; use --finetuning_type lora or drop --quantization_bit"
            )


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """How the optimizer walks over the samples."""

    epochs: float = 3.0
    """Passes over the training samples."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, whatever --epochs says."""
    batch_size: int = 2
    """Samples in one micro-batch."""
    accumulation_steps: int = 4
    """Micro-batches in one optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate. Default: 2e-4 (LoRA), 1e-5 (full, freeze), 5e-6 (preference methods)."""
    lr_scheduler_type: SchedulerType = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    optimizer: OptimizerType = "adamw"
    """adamw_8bit and paged_adamw_8bit keep their state in 8 bit (bitsandbytes)."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = 1.0
    """Gradient clipping, L2 norm over all trained parameters."""
    no_gradient_checkpointing: bool = False
    """Keep activations instead of recomputing them: faster, more memory. (A CPU never recomputes.)"""
    no_packing: bool = False
    """Pad the samples of a micro-batch instead of packing them into one row."""
    seed: int = 3407
    """Seed of the sample order, dropout and initial LoRA weights."""
    dataloader_workers: int = 0
    """Accepted for compatibility: a batch is a function of (seed, step) made in under a millisecond."""

    def __post_init__(self) -> None:
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        for flag in ("batch_size", "accumulation_steps"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "at least 1")
        require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        require(0 <= self.warmup_ratio < 1, "warmup_ratio", self.warmup_ratio, "from 0 to below 1")
        require(
            self.learning_rate is None or 0 < self.learning_rate < 1,
            "learning_rate",
            self.learning_rate,
            "between 0 and 1, such as 2e-4",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where the run lives, and when it reports and saves."""

    output_dir: str | None = None
    """Run folder. Default: output/COMMAND-DATE-TIME."""
    resume: str | None = None
    """auto continues from the newest intact checkpoint of the run folder; a path from that one."""
    overwrite: bool = False
    """Start anew in a folder that already holds checkpoints (they are deleted)."""
    save_steps: int = 100
    """Optimizer steps between checkpoints."""
    save_total_limit: int = 2
    """Checkpoints kept; older ones are deleted after the new one is on disk."""
    logging_steps: int = 10
    """Optimizer steps between printed lines (metrics.jsonl has every step)."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations. Default: as --save_steps."""
    report_to: str = "none"
    """Trackers by commas: tensorboard, wandb, swanlab, mlflow."""
    time_budget: Seconds | None = None
    """End within this time, the start of the process, evaluations and saving included: 90, 90s, 5m, 2.5h, 1h30m. The
    learning rate decays to the last step that fits. A resumed run has the time anew."""
    extend_epochs: float | None = None
    """With --resume: train this many epochs beyond --epochs (or --max_steps), with a warm-up and decay of their own.
    Repeat the same number to resume the extension; a larger one extends further."""

    def __post_init__(self) -> None:
        for flag in ("save_steps", "save_total_limit", "logging_steps"):
            require(getattr(self, flag) >= 1, flag, getattr(self, flag), "at least 1")
        for flag in ("time_budget", "extend_epochs"):
            value = getattr(self, flag)
            require(value is None or value > 0, flag, value, "above 0")
        if self.extend_epochs is not None and self.resume is None:
            raise UsageError(
                f"--extend_epochs {self.extend_epochs:g}: continues an earlier training; add --resume auto"
            )


@dataclass(frozen=True, kw_only=True)
class WatchSettings:
    """What is looked at every --eval_steps, and what follows from it."""

    metric_for_best: BestMetric = "loss"
    """Figure of an evaluation that tells the best one: loss on the held-out samples, or a share over the generated
    answers (exact_match, term_coverage, association_coverage), or with dpo rewards/accuracies, rewards/margins."""
    early_stopping_patience: int | None = None
    """End the training after this many evaluations in a row that were no better than the best one. Default: never."""
    early_stopping_min_delta: float = 0.0
    """Smallest change of --metric_for_best that counts as better."""
    load_best: bool | None = None
    """Take the final weights from the best evaluation instead of the last step. Default: with
    --early_stopping_patience and with --forgetting stop, otherwise not."""
    no_keep_best: bool = False
    """Let the checkpoint of the best evaluation be deleted like any other (see --save_total_limit)."""
    sample_generations: int | None = None
    """Held-out questions that are answered at each evaluation and kept in generations.jsonl; from 8 on the answers are
    scored too. Default: 2, or 32 when --metric_for_best needs answers; 0 for none."""
    sample_max_new_tokens: int = 128
    """Longest of these answers, tokens."""
    forgetting: Forgetting = "warn"
    """When the loss on general questions rises past --forgetting_limit: warn, stop, or replay (mix general rows into
    the steps that follow)."""
    forgetting_limit: float = 0.3
    """Largest rise over the loss before step 1, nats a token; 0.3 makes each right token a quarter less likely."""
    general_dataset: str | None = None
    """General questions and answers of your own. Default: 64 bundled ones, Chinese and English. Half of the rows are
    measured, the other half is what replay uses."""
    replay_samples: int = 2
    """General rows in each optimizer step once replay has begun."""

    def __post_init__(self) -> None:
        for flag in ("early_stopping_patience", "sample_max_new_tokens", "replay_samples"):
            value = getattr(self, flag)
            require(value is None or value >= 1, flag, value, "at least 1")
        require(self.early_stopping_min_delta >= 0, "early_stopping_min_delta", self.early_stopping_min_delta, "0 up")
        require(self.forgetting_limit > 0, "forgetting_limit", self.forgetting_limit, "above 0, such as 0.3")
        number = self.sample_generations
        require((number or 0) >= 0, "sample_generations", number, "0 or more")
        if self.answers_scored and number is not None and number < FEWEST_SCORED:
            raise UsageError(
                f"--sample_generations {number}: --metric_for_best {self.metric_for_best} needs {FEWEST_SCORED} or more"
            )
        if self.no_keep_best and self.takes_best:
            raise UsageError(
                "--no_keep_best True: the final weights are to come from the best checkpoint; leave it out"
            )

    @property
    def answers_scored(self) -> bool:
        """The best evaluation is told by generated answers."""
        return self.metric_for_best in ANSWER_METRICS

    @property
    def answers(self) -> int:
        """Held-out questions that each evaluation answers."""
        if self.sample_generations is not None:
            return self.sample_generations
        return 32 if self.answers_scored else 2

    @property
    def takes_best(self) -> bool:
        """The final weights are those of the best evaluation."""
        if self.load_best is not None:
            return self.load_best
        return self.early_stopping_patience is not None or self.forgetting == "stop"


@dataclass(frozen=True, kw_only=True)
class GuardSettings:
    """What happens when the numbers of a training go wrong."""

    max_bad_steps: int = 10
    """Steps in a row whose loss or gradient is NaN or infinite before --on_bad_steps acts. None of them is applied."""
    on_bad_steps: Literal["rewind", "stop"] = "rewind"
    """Go back to the last checkpoint with half the learning rate, once, and stop the second time; or stop at once."""
    loss_spike: Literal["warn", "skip", "rewind", "off"] = "warn"
    """A step whose loss or gradient is far above the recent ones: name its samples; skip it too; or skip it, and go
    back with half the learning rate, once, after three in a row."""

    def __post_init__(self) -> None:
        require(self.max_bad_steps >= 1, "max_bad_steps", self.max_bad_steps, "at least 1")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished training run that a later command builds on; explicit flags win over what the run recorded."""

    run: str | None = None
    """Run folder of a training: model, adapter, template, domain and thinking mode are read from it."""


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How answers are generated."""

    max_new_tokens: int = 512
    """Longest answer, tokens."""
    think_chain: bool | None = None
    """Let the model think before it answers. Default: as it was trained; the run knows."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the likeliest token."""
    top_p: float = 0.95
    """Nucleus sampling: the smallest set of tokens with this probability."""
    top_k: int = 20
    """Sample from the k likeliest tokens."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        require(0 <= self.temperature <= 2, "temperature", self.temperature, "from 0 to 2")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """What a quantised file may lose against the 16-bit one, on held-out answers."""

    gate: float | None = None
    """Largest allowed loss of a quantised file: the smallest that passes is what uf deploy takes; none passing is an
    error. By default mean KL divergence from the 16-bit file in nats a token (0.02: perplexity rises by about 2 %)."""
    gate_measure: GateMeasure = "kl"
    """What --gate limits, by the upper end of its 95 % interval: kl = mean KL divergence; perplexity = its relative
    rise; accuracy = drop of the share of answer tokens that are held likeliest."""
    gate_tokens: int = 4096
    """Held-out answer tokens that are measured."""

    def __post_init__(self) -> None:
        require(self.gate is None or 0 < self.gate <= 10, "gate", self.gate, "above 0 and at most 10, such as 0.02")
        require(self.gate_tokens >= 1, "gate_tokens", self.gate_tokens, "at least 1")
