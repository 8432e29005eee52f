"""One settings type for each command, made of the groups in `settings.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from unsloth_factory.config.errors import require, require_at_least
from unsloth_factory.config.judging import EndpointSettings, JudgeSettings, ReviewSettings
from unsloth_factory.config.settings import (
    BaseWeights,
    DataSettings,
    FinishedRun,
    GateSettings,
    GenerationSettings,
    GuardSettings,
    LoopSettings,
    ModelSettings,
    RunSettings,
    TuningSettings,
    WatchSettings,
)
from unsloth_factory.config.values import Names

CEVAL_LANGUAGES = ("zh", "en")


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning on conversations."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tuning: TuningSettings = field(default_factory=TuningSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    run: RunSettings = field(default_factory=RunSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)


@dataclass(frozen=True, kw_only=True)
class DpoConfig(SftConfig):
    """Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) on chosen/rejected pairs."""

    beta: float = 0.1
    """Strength of the pull towards the reference model."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(DpoConfig):
    """What a training needs before it is started: peak memory by part, speed, time, and the best settings that fit.

    Takes the settings of `uf sft` and `uf dpo`; of the model config.json is enough.
    """

    method: Literal["sft", "dpo", "grpo"] = "sft"
    """The training to plan."""
    gpu: str = "auto"
    """T4, L4, 3060, 4090, A100, A100-80GB, H100, H200, a size such as 16GB, or auto for the card of this machine."""
    json: bool = False
    """Print the plan as JSON, sizes in bytes and times in seconds."""


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """Base and tuned model side by side on the validation samples and the domain pack's rules."""

    source: FinishedRun = field(default_factory=FinishedRun)
    gguf: str | None = None
    """Answer with these GGUF files through llama.cpp instead, by commas; all takes every one of the run folder."""
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    remote: EndpointSettings = field(default_factory=EndpointSettings)
    judging: JudgeSettings = field(default_factory=JudgeSettings)
    reviewing: ReviewSettings = field(default_factory=ReviewSettings)
    max_samples: int = 100
    """Validation samples to answer."""
    batch_size: int | None = None
    """Answers generated together. Default: 8 on a GPU, 32 on a CPU."""
    bertscore: str | None = None
    """Folder of an encoder (such as bert-base-chinese) by whose vectors answers are compared with references."""
    bertscore_layer: int | None = None
    """Its layer. Default: the published choice for a folder of that name, else the last."""
    save_dir: str | None = None
    """Folder of the results. Default: validation_results in the run folder."""
    quantization_bit: Literal[4] | None = None
    """4 loads the base in NF4. Default: as it was trained."""

    def __post_init__(self) -> None:
        require_at_least(1, self, "max_samples", "batch_size", "bertscore_layer")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """A benchmark, by log-probabilities of the choices or by generated answers; base and tuned from one load."""

    source: FinishedRun = field(default_factory=FinishedRun)
    gguf: str | None = None
    """Score these GGUF files through llama.cpp instead, by commas; all takes every one of the run folder."""
    model: ModelSettings = field(default_factory=ModelSettings)
    models: Names | None = None
    """Models, or run folders, to choose from: each is scored, and set against its size, memory and speed."""
    task: str = "ceval"
    """ceval, cmmlu, mmlu, gsm8k, lm_eval:NAME, a YAML file, a table (question, answer, maybe A, B, ...); or several."""
    lm_eval_include: str | None = None
    """Folder with tasks of one's own for lm_eval:NAME, as lm-evaluation-harness reads them."""
    task_dir: str | None = None
    """Folder of the benchmark's data in its upstream layout (dev/, val/). Of several: holds a folder named as each."""
    n_shot: int | None = None
    """Worked examples before each question, from the dev split alone. Default: 5; of an lm_eval task its own."""
    lang: Literal["zh", "en"] | None = None
    """Language of the prompt around the questions. Default: the benchmark's first."""
    subjects: str | None = None
    """Subjects by commas; default: all."""
    choice_mode: Literal["letter", "text", "text_normalized", "generate"] = "letter"
    """What is scored: the option's letter, its text (options not listed), that per character, or a generated answer."""
    scorer: Literal["number", "exact", "contains", "f1"] | None = None
    """How generated answers are scored. Default: the benchmark's own; of a table number if all answers are, else f1."""
    split: Literal["val", "test"] | None = None
    """Questions that are scored. Default: the benchmark's own, val for ceval, test for cmmlu and mmlu."""
    batch_size: int | None = None
    """Answers generated together (default: 8), or most questions scored together (default: as is quickest)."""
    max_samples: int | None = None
    """Only the first so many questions, of a benchmark whose answers are generated."""
    max_new_tokens: int | None = None
    """Longest generated answer, tokens. Default: the benchmark's own."""
    thinking_budget: int | None = None
    """Longest thinking before a generated answer, tokens: then it is closed, and the model has to answer."""
    no_chat_template: bool = False
    """Plain text prompt instead of the model's chat template."""
    think_chain: bool | None = None
    """Render prompts with thinking on; default: off where choices are scored, else as trained."""
    remote: EndpointSettings = field(default_factory=EndpointSettings)
    save_dir: str | None = None
    """Folder of the results. Default: evaluation_results in the run folder."""
    quantization_bit: Literal[4] | None = None
    """4 loads the base in NF4. Default: as it was trained."""

    def __post_init__(self) -> None:
        require_at_least(0, self, "n_shot")
        require_at_least(1, self, "batch_size", "max_samples", "max_new_tokens", "thinking_budget")

    @property
    def shots(self) -> int:
        """Worked examples where the benchmark has no number of its own."""
        return 5 if self.n_shot is None else self.n_shot


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talk to a model in the terminal."""

    source: FinishedRun = field(default_factory=FinishedRun)
    model: ModelSettings = field(default_factory=ModelSettings)
    generation: GenerationSettings = field(default_factory=lambda: GenerationSettings(temperature=0.6))
    domain: str | None = None
    """Domain pack whose system prompt is used."""
    system: str | None = None
    """System prompt."""
    no_context: bool = False
    """Answer each line on its own, without the history."""
    gguf: str | None = None
    """Chat with this GGUF file through llama.cpp instead."""
    quantization_bit: Literal[4] | None = None
    """4 loads the base in NF4. Default: as it was trained."""


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """An OpenAI-compatible server of one model: /v1/models, /v1/chat/completions, /v1/completions."""

    source: FinishedRun = field(default_factory=FinishedRun)
    model: ModelSettings = field(default_factory=ModelSettings)
    generation: GenerationSettings = field(default_factory=lambda: GenerationSettings(temperature=0.6))
    gguf: str | None = None
    """Serve this GGUF file through llama.cpp instead."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 opens the server to the network (set a key then)."""
    port: int = 8000
    """Port; 0 takes a free one."""
    name: str | None = None
    """Name of the model. Default: the run folder's, the GGUF file's or the model's."""
    domain: str | None = None
    """Domain pack whose system prompt conversations without one get."""
    system: str | None = None
    """System prompt of conversations without one. Default: as trained."""
    max_waiting: int = 64
    """Requests that may wait while one is answered; more are sent away with status 503."""
    serve_key_env: str = "UF_SERVE_API_KEY"
    """Environment variable with the key that requests must carry; no key is asked for while it is not set."""
    quantization_bit: Literal[4] | None = None
    """4 loads the base in NF4. Default: as it was trained."""

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "from 0 to 65535")
        require_at_least(0, self, "max_waiting")


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Write the adapter into 16-bit weights, on the CPU, shard by shard."""

    source: FinishedRun = field(default_factory=FinishedRun)
    model: ModelSettings = field(default_factory=ModelSettings)
    output: str | None = None
    """Folder of the merged model. Default: merged_model in the run folder."""
    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    """auto stores float16 unless a weight overflows it."""
    max_shard_size: str = "4GB"
    """Largest weight file."""
    base_weights: BaseWeights = "auto"
    """Base of a QLoRA adapter: the NF4 values it was trained on (as_trained, the default) or the original ones."""
    compare_base_weights: bool = False
    """Score both on the validation split and keep the better one."""
    overwrite: bool = False
    """Replace an existing merged model."""


@dataclass(frozen=True, kw_only=True)
class GgufConfig:
    """Convert the merged model to GGUF and check that it answers the same."""

    source: FinishedRun = field(default_factory=FinishedRun)
    model: str | None = None
    """Merged model folder. Default: merged_model in the run folder."""
    output: str | None = None
    """GGUF file. Default: gguf/NAME-f16.gguf in the run folder."""
    outtype: Literal["f16", "bf16", "q8_0", "f32"] = "f16"
    """Number format of the matrices."""
    llama_cpp: str | None = None
    """Your llama.cpp checkout, whose converter is used instead of the packaged one."""
    no_check: bool = False
    """Skip the comparison with transformers (needs the model in memory)."""


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Quantise a GGUF file."""

    source: FinishedRun = field(default_factory=FinishedRun)
    gguf: str | None = None
    """16-bit GGUF file. Default: the one in the run folder."""
    types: str = "q4_k_m"
    """Types by commas: q4_0, q4_k_m, q5_k_m, q6_k, q8_0, or another that the library offers."""
    output: str | None = None
    """Folder of the quantised files. Default: beside the GGUF file."""
    imatrix: bool = False
    """Round so that the weights which the training text uses most keep most: an importance matrix. Needs llama-imatrix
    and llama-quantize on the PATH; allows types below 3 bits (iq2_m, iq2_xxs, ...)."""
    quality: GateSettings = field(default_factory=GateSettings)


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """What quantising costs: perplexity and KL divergence of each GGUF file against the 16-bit one, and the gate."""

    source: FinishedRun = field(default_factory=FinishedRun)
    gguf: str = "all"
    """GGUF files by commas, one of them in 16 bits; all takes every one of the run folder."""
    quality: GateSettings = field(default_factory=GateSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    save_dir: str | None = None
    """Folder of the results. Default: quality_results in the run folder."""


@dataclass(frozen=True, kw_only=True)
class DeployConfig:
    """Write the Modelfile and create the model in Ollama."""

    source: FinishedRun = field(default_factory=FinishedRun)
    gguf: str | None = None
    """GGUF file to serve. Default: the one that the quality gate picked, else the smallest in the run folder."""
    name: str | None = None
    """Name of the Ollama model. Default: from the run folder's name."""
    system: str | None = None
    """System prompt. Default: as trained."""
    num_ctx: int | None = None
    """Context length, tokens. Default: the trained sequence length, at least 4096 where the model allows."""
    temperature: float = 0.6
    """Sampling temperature that Ollama uses."""
    ollama_host: str | None = None
    """Server address. Default: the environment variable OLLAMA_HOST, else http://127.0.0.1:11434."""


@dataclass(frozen=True, kw_only=True)
class RunPlanConfig:
    """Run the stages of a plan file one after the other; a stage whose inputs are unchanged is skipped."""

    plan: str | None = None
    """The plan: a YAML file (the first positional argument)."""
    output_dir: str | None = None
    """Run folder, instead of the plan's."""
    force: bool = False
    """Run every stage again; a training starts anew, and its old result is deleted."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole factory on the bundled tiny model and data, offline, in under three minutes."""

    output_dir: str = "output/demo"
    """Run folder."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """What this machine has for the factory; each problem with its fix."""

    output_dir: str = "output"
    """Folder whose disk is looked at."""
