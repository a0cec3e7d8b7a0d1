"""What is trained, on what and for how long: the sections run, model, data, optimizer and checkpoint.

Their defaults are the digits run that `kfdist train` starts without a file.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from kfdist.config.fields import Counts, FileName, Section, Settings, TrackerNames
from kfdist.errors import ConfigError
from kfdist.types import MAX_STEPS


class RunSection(Section):
    """What is run, where its files go and for how long."""

    name: str = Field(
        default="digits",
        pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$",
        description="the run's name: 1 to 63 of a-z 0-9 . _ -, beginning and ending with a letter or digit",
    )
    dir: FileName | None = Field(default=None, description="the run directory; runs/NAME if not given")
    seed: int = Field(default=1, ge=0, lt=2**63, description="seeds everything random in the run")
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS, description="training steps; excludes run.epochs")
    epochs: int | None = Field(
        default=None, ge=1, le=MAX_STEPS, description="passes over the training data; excludes run.steps"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where ranks compute; auto takes CUDA if there is any"
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="what forward and backward compute in; parameters and curvature stay float32"
    )
    channels_last: bool = Field(
        default=False,
        description="whether convolutions see images with channels last, faster on GPUs in half precision",
    )
    log_period: int = Field(default=10, ge=1, description="steps between two lines of progress and of metrics.jsonl")
    eval_period: int = Field(
        default=0, ge=0, description="steps between two evaluations on the test data; 0: only at the end"
    )
    eval_epochs: int = Field(
        default=0, ge=0, description="passes over the data between two evaluations; 0: none by epoch"
    )
    target_accuracy: float | None = Field(
        default=None, gt=0, lt=1, description="test accuracy the time to which is told; MLPerf's for ImageNet is 0.759"
    )
    stop_at_target: bool = Field(default=False, description="whether the run is finished once it has reached that")
    trackers: TrackerNames = Field(
        default=(),
        description="what is told the numbers of metrics.jsonl besides: tensorboard (RUN/tensorboard), mlflow "
        "(MLFLOW_TRACKING_URI, else RUN/mlruns); each is an extra of kfdist",
    )
    report: bool = Field(
        default=True, description="whether `kfdist train` ends with report.html; `kfdist report` writes it at any time"
    )
    accept_changes: bool = Field(
        default=False, description="whether a run directory started with another configuration may be taken over"
    )

    @property
    def directory(self) -> Path:
        """Where the run's files go: `dir`, or `runs/NAME`."""
        return Path(self.dir) if self.dir else Path("runs") / self.name

    @model_validator(mode="after")
    def _a_target_to_stop_at(self) -> Self:
        if self.stop_at_target and self.target_accuracy is None:
            raise ConfigError("is true, but there is no run.target_accuracy; give one", path="stop_at_target")
        if self.stop_at_target and not self.eval_period and not self.eval_epochs:
            raise ConfigError(
                "is true, but the run is evaluated at its end alone; give run.eval_period or run.eval_epochs",
                path="stop_at_target",
            )
        return self

    @model_validator(mode="after")
    def _steps_xor_epochs(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            received = "both are given" if self.steps is not None else "neither run.steps nor run.epochs is given"
            raise ConfigError(f"{received}; give one of them", path="steps")
        return self


class ModelSection(Section):
    """Which model is trained."""

    name: str = Field(
        default="digits-cnn", min_length=1, description='a model of kfdist.models, or "package.module:function"'
    )
    settings: Settings = Field(default_factory=dict, description="the model's own settings")


class DataSection(Section):
    """What the model is trained on."""

    name: str = Field(
        default="digits", min_length=1, description='a data set of kfdist.data, or "package.module:function"'
    )
    batch_size: int = Field(default=64, ge=1, description="examples per rank and step")
    micro_batches: int = Field(
        default=1,
        ge=1,
        description="parts in which a rank takes its examples of a step, a backward each; bounds memory",
    )
    loader_processes: int = Field(
        default=2,
        ge=0,
        le=1024,
        description="processes per rank that read ahead what isn't in memory, for training and for evaluation each; 0: "
        "the rank reads by itself",
    )
    corrupt_limit: int = Field(
        default=100,
        ge=0,
        description="most examples that may be unreadable, and replaced by others, before the run ends",
    )
    settings: Settings = Field(default_factory=dict, description="the data set's own settings")

    @model_validator(mode="after")
    def _micro_batches_are_equal(self) -> Self:
        if self.batch_size % self.micro_batches:
            raise ConfigError(
                f"is {self.micro_batches}, which doesn't divide data.batch_size = {self.batch_size}; it must, so that "
                "all micro-batches weigh the same",
                path="micro_batches",
            )
        return self


OWN_OPTIMIZER = "kfdist"
"""The name of `kfdist.Optimizer` among the optimizers."""


class OptimizerSection(Section):
    """The optimizer that applies the preconditioned gradients, and its learning rate."""

    name: str = Field(
        default="kfdist",
        min_length=1,
        description="kfdist.Optimizer, which goes by the learning rate of AdamW or of settings.graft, without kl_clip; "
        "or an optimizer of torch.optim, in lower case, with other defaults (docs/decisions/0035)",
    )
    lr: float = Field(
        default=0.01,
        gt=0,
        description="the peak learning rate, of the digits run; 0.003 where data or model are named; 0.1 "
        'for optimizers of torch.optim and with graft = "sgd"',
    )
    lr_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="examples per step of all ranks that lr is meant for; it is scaled linearly to the run's. Unscaled "
        "if not given",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum, for the optimizers that have one")
    weight_decay: float = Field(
        default=1e-2, ge=0, description="weight decay, decoupled; 5e-4 for optimizers of torch.optim"
    )
    decay_vectors: bool = Field(
        default=True, description="whether it acts on parameters of one dimension too: biases and norms"
    )
    average_decay: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="what a step keeps of the weights' moving average, which is evaluated too; no average if not given",
    )
    settings: Settings = Field(default_factory=dict, description="further arguments of the optimizer")
    schedule: Literal["constant", "cosine", "linear", "polynomial", "step"] = Field(
        default="cosine", description="how the learning rate falls from its peak to lr * final_lr_fraction"
    )
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1, description="the last learning rate as a fraction of lr")
    power: float = Field(default=2.0, gt=0, description='exponent of schedule = "polynomial"; 1 is linear')
    decay_epochs: int | None = Field(
        default=None, ge=1, description="epoch at which the schedule is at its end; the run's end if not given"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps in which the learning rate rises linearly to lr")
    warmup_epochs: float = Field(default=0, ge=0, description="the same in passes over the data; excludes warmup_steps")
    milestones: Counts = Field(
        default=(), description='steps at which schedule = "step" multiplies the learning rate by milestone_factor'
    )
    milestone_epochs: Counts = Field(default=(), description="the same in passes over the data; excludes milestones")
    milestone_factor: float = Field(
        default=0.1, gt=0, le=1, description="what a milestone multiplies the learning rate by"
    )

    @property
    def grafts(self) -> bool:
        """Whether steps have a length of their own, so that there is no KL clip."""
        return self.name == OWN_OPTIMIZER and self.settings.get("graft") != "none"

    @model_validator(mode="after")
    def _milestones_belong_to_step(self) -> Self:
        received = f"is {list(self.milestones)}"
        if self.milestone_epochs and self.milestones:
            raise ConfigError(f"{received} and milestone_epochs is given too; give one of them", path="milestones")
        if self.warmup_epochs and self.warmup_steps:
            raise ConfigError(
                f"is {self.warmup_steps} and warmup_epochs is given too; give one of them", path="warmup_steps"
            )
        if bool(self.milestones or self.milestone_epochs) != (self.schedule == "step"):
            reason = f'schedule is "{self.schedule}"; milestones go with schedule = "step": give both or neither'
            raise ConfigError(f"{received} and {reason}", path="milestones")
        for name in ("milestones", "milestone_epochs"):
            listed = list(getattr(self, name))
            if listed != sorted(set(listed)):
                raise ConfigError(f"is {listed}; the steps must rise", path=name)
        return self


class CheckpointSection(Section):
    """When checkpoints are written and what is in them."""

    period: int = Field(default=50, ge=0, description="steps between two checkpoints; 0: only at a stop and at the end")
    keep: int = Field(default=3, ge=1, description="how many checkpoints are kept")
    statistics: Literal["per-rank", "folded"] = Field(
        default="per-rank", description="per-rank: resumes bit for bit at the same world size; folded: smaller"
    )
    stop_seconds: float = Field(
        default=0.0, ge=0, description="least time that `kfdist train` gives ranks for the checkpoint of a stop"
    )
