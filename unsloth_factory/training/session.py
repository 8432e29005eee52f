"""The parts of a running training, and the little state that walks from step to step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers

from unsloth_factory.config.errors import UserError
from unsloth_factory.data.batching import Batch, StepPlan
from unsloth_factory.training.checkpoints import resume
from unsloth_factory.training.job import TrainingJob
from unsloth_factory.training.memory.levers import Levers
from unsloth_factory.training.memory.meter import Meter, meter_of
from unsloth_factory.training.memory.watch import MemoryWatch
from unsloth_factory.training.optimizers import make_optimizer, state_bytes
from unsloth_factory.training.pacing import schedule
from unsloth_factory.training.pacing.time_budget import TimeBox
from unsloth_factory.training.reporting.metrics import MetricsLog
from unsloth_factory.training.reporting.progress import Progress

PRECISIONS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "no"}


@dataclass
class LoopState:
    """What the loop remembers between steps; stored in state.json."""

    step: int = 0
    """Optimizer steps done: applied, or skipped because they were not finite."""
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    applied: int = 0
    skipped: int = 0
    scaler_skips: int = 0
    bad_streak: int = 0
    """Steps in a row that were not finite."""
    rewound: bool = False
    """The run has been set back to a checkpoint once."""
    levers: Levers = field(default_factory=Levers)
    """What was given up for memory."""
    last_loss: float | None = None
    eval_loss: float | None = None
    eval_metrics: dict[str, float] = field(default_factory=dict)
    best_eval_loss: float | None = None
    """Lowest so far."""
    best_metric: str | None = None
    """What `best_value` is a value of."""
    best_value: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    """Evaluations in a row that were no better than the best one."""
    general_start: float | None = None
    """Loss on the general questions before the first step, per token."""
    general_loss: float | None = None
    forgetting: bool = False
    """The last general loss was past the limit."""
    replay_from: int | None = None
    """First step (index from 0) with general rows in it."""
    replay_data: str | None = None
    """SHA-256 of those rows."""
    recent_losses: list[float] = field(default_factory=list)
    """Of the steps that were applied last; what a spike is measured by."""
    recent_norms: list[float] = field(default_factory=list)
    merged_tokens: int | None = None
    """Samples of a step are put together into micro-batches of about so many tokens; None: as --batch_size says."""
    micro_batch_costs: list[float] = field(default_factory=list)
    """What they take by their tokens, as `model.fast.pace` measures it; kept, so that a resumed run packs alike."""
    spikes: int = 0
    spike_streak: int = 0
    """Steps in a row that were skipped because of a spike."""
    rate_factor: float = 1.0
    """The scheduled learning rate is multiplied by it; each rewind halves it."""
    scaler_warned: bool = False
    pending: dict[str, Any] | None = None
    """Line of metrics.jsonl of a step whose evaluation was interrupted by a signal."""
    schedule_start: int = 0
    """Step at which the present warm-up and decay began: 0, or where the run was extended."""
    extended_epochs: float = 0.0
    """--extend_epochs of the present extension."""
    progress: float | None = None
    """Share of the warm-up and decay that is behind, where the time decides (see time_budget.py); else None."""
    step_share: float = 0.0
    """What the next step is expected to add to it."""
    end: str | None = None
    """Why the run ends before its last step; None while it goes on."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def load(self, values: dict[str, Any]) -> None:
        """Take over the values of a checkpoint; what an older version did not store keeps its default."""
        fresh = LoopState()
        for known in fields(self):
            setattr(self, known.name, values.get(known.name, getattr(fresh, known.name)))
        self.levers = Levers.of(values.get("levers"))


@dataclass
class Session:
    """One running training. Built by `open_session`, used by the loop, not kept."""

    job: TrainingJob
    accelerator: Accelerator
    optimizer: Any
    """accelerate's wrapper around the torch optimizer."""
    parameters: list[torch.nn.Parameter]
    plan: StepPlan
    peak_rate: float
    fingerprint: dict[str, Any]
    metrics: MetricsLog
    generations: MetricsLog
    """Answers to held-out questions, a line each; in step with the checkpoints like `metrics`."""
    progress: Progress
    time_box: TimeBox
    state: LoopState
    meter: Meter
    memory_watch: MemoryWatch = field(default_factory=MemoryWatch)
    resumed_from: int | None = None
    ahead: tuple[tuple[int | None, ...], list[Batch]] | None = None
    """The next step's micro-batches, already made, and what they depend on."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.plan.total_steps

    @property
    def over(self) -> bool:
        """No further step is to be done."""
        return self.state.end is not None or self.state.step >= self.total_steps

    @property
    def steps_to_come(self) -> int:
        """Steps that are left, as far as the time is expected to allow."""
        left = self.total_steps - self.state.step
        return left if self.time_box.fitting is None else min(left, self.time_box.fitting)

    @property
    def evaluation_steps(self) -> int:
        """Steps between two evaluations."""
        return self.job.run.eval_steps or self.job.run.save_steps

    @property
    def packing(self) -> bool:
        """Samples of a micro-batch share one row."""
        return not self.job.loop.no_packing

    @property
    def pad_id(self) -> int:
        """Token that fills padded rows; it is masked, so any token will do."""
        tokenizer = self.job.loaded.tokenizer
        return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    @property
    def checkpoint_bytes(self) -> int:
        """Estimated size of a checkpoint: weights, optimizer state, and room for the small files."""
        weights = sum(p.numel() * p.element_size() for p in self.parameters)
        return int(1.05 * (weights + state_bytes(self.job.loop.optimizer, self.parameters))) + 2**20

    def rate(self, step: int) -> float:
        """Learning rate of a step (index from 0); with a time budget that of the present one, whatever its index."""
        loop, state = self.job.loop, self.state
        settings: dict[str, Any] = {
            "peak": self.peak_rate,
            "shape": loop.lr_scheduler_type,
            "warmup_ratio": loop.warmup_ratio,
        }
        if state.progress is not None:
            return state.rate_factor * schedule.paced_rate(state.progress, state.step_share, **settings)
        first = state.schedule_start
        return state.rate_factor * schedule.learning_rate(step - first, self.total_steps - first, **settings)


def open_session(job: TrainingJob, progress: Progress) -> Session:
    """Build the parts of a training. Nothing is written, and no weight changes.

    Raises:
        UserError: There is nothing to train on, or a tracker is not installed.
    """
    if not job.train_items:
        raise UserError("No training sample is left. See data_report.json for what was skipped and why.")
    job.method.prepare(job.loaded, job.tuning)
    loop = job.loop
    # A CPU has memory enough and no time to spare; there activations are always kept.
    job.loaded.set_gradient_checkpointing(job.loaded.device.type != "cpu" and not loop.no_gradient_checkpointing)
    parameters = job.loaded.optimized_parameters()
    accelerator = _accelerator(job)
    optimizer = make_optimizer(loop.optimizer, parameters, weight_decay=loop.weight_decay)
    peak = schedule.peak_learning_rate(loop, job.tuning, job.method.name)
    return Session(
        job=job,
        accelerator=accelerator,
        optimizer=accelerator.prepare_optimizer(optimizer, device_placement=False),
        parameters=parameters,
        plan=_plan(job),
        peak_rate=peak,
        fingerprint=_fingerprint(job, peak),
        metrics=MetricsLog(job.folder.metrics),
        generations=MetricsLog(job.folder.generations),
        progress=progress,
        time_box=TimeBox(job.run.time_budget or math.inf, job.started, 3.0 if _trackers(job.run.report_to) else 0.0),
        state=LoopState(),
        meter=job.meter or meter_of(job.loaded),
    )


def _plan(job: TrainingJob) -> StepPlan:
    """The samples of every step; an extension goes beyond --max_steps where that is given."""
    loop, extend_epochs = job.loop, job.run.extend_epochs
    plan = StepPlan(
        n_samples=len(job.train_items),
        batch_size=loop.batch_size,
        accumulation_steps=loop.accumulation_steps,
        epochs=loop.epochs,
        max_steps=loop.max_steps,
        seed=loop.seed,
    )
    if extend_epochs is None:
        return plan
    if loop.max_steps is None:
        return replace(plan, epochs=loop.epochs + extend_epochs)
    return replace(plan, max_steps=loop.max_steps + replace(plan, epochs=extend_epochs, max_steps=None).total_steps)


def _fingerprint(job: TrainingJob, peak_rate: float) -> dict[str, Any]:
    return resume.fingerprint(
        method=job.method.name,
        method_settings=job.method.settings(),
        items=job.train_items,
        loaded=job.loaded,
        template_sha256=job.template.sha256,
        tuning=job.tuning,
        loop=job.loop,
        peak_rate=peak_rate,
    )


def _accelerator(job: TrainingJob) -> Accelerator:
    """Precision follows the model's computation dtype; fp16 brings the loss scaler."""
    precision = PRECISIONS[job.loaded.dtype]
    # accelerate keeps its precision for the life of the process and refuses another one: let a second training of the
    # same process (a notebook, the tests) have its own.
    if AcceleratorState._shared_state and AcceleratorState._shared_state.get("_mixed_precision") != precision:
        AcceleratorState._reset_state()
    trackers = _trackers(job.run.report_to)
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=job.loaded.device.type == "cpu",
        log_with=trackers or None,
        project_dir=str(job.folder.path) if trackers else None,
    )
    if trackers:
        accelerator.init_trackers(job.folder.path.name, config=_flat(job.manifest.config))
    return accelerator


def _trackers(report_to: str) -> list[str]:
    wanted = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    missing = [name for name in wanted if name not in available]
    if missing:
        raise UserError(
            f"--report_to {report_to}: {', '.join(missing)} is not installed. pip install {' '.join(missing)}, "
            f"or choose from: none{''.join(', ' + name for name in available)}."
        )
    return wanted


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
