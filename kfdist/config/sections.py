"""The sections of the configuration. Their defaults are the digits run that `kfdist train` starts without a file.

Every `*_period` counts training steps; other units are in the names. A field's description is shown with its errors.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kfdist.config.fields import (
    Address,
    Counts,
    CountStages,
    FileName,
    Labels,
    Methods,
    Names,
    Ports,
    RayAddress,
    Resources,
    Section,
    Settings,
    Stages,
)
from kfdist.errors import ConfigError
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import Adoption, Asap, AtHardBound, FixedLag
from kfdist.system.addresses import UNPROTECTED, is_loopback, split_address
from kfdist.system.credentials import Credentials, Role
from kfdist.types import Fisher, WeightSharing


class RunSection(Section):
    """What is run, where its files go and for how long."""

    name: str = Field(
        default="digits",
        pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$",
        description="the run's name: 1 to 63 of a-z 0-9 . _ -, beginning and ending with a letter or digit",
    )
    dir: FileName | None = Field(default=None, description="the run directory; runs/NAME if not given")
    seed: int = Field(default=1, ge=0, lt=2**63, description="seeds everything random in the run")
    steps: int | None = Field(default=None, ge=1, description="training steps; excludes run.epochs")
    epochs: int | None = Field(default=None, ge=1, description="passes over the training data; excludes run.steps")
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


class OptimizerSection(Section):
    """The optimizer that applies the preconditioned gradients, and its learning rate."""

    name: str = Field(default="sgd", min_length=1, description="an optimizer of torch.optim, in lower case")
    lr: float = Field(default=0.1, gt=0, description="the peak learning rate")
    lr_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="examples per step of all ranks that lr is meant for; it is scaled linearly to the run's. Unscaled "
        "if not given",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum, for the optimizers that have one")
    weight_decay: float = Field(default=5e-4, ge=0, description="weight decay")
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


class StalenessSection(Section):
    """What happens under `asap` when the inverse in use gets old; the names are those of `kfdist.Asap`."""

    soft_bound: int | None = Field(
        default=None, ge=1, description="steps of staleness above which damping is raised; none if not given"
    )
    hard_bound: int | None = Field(
        default=None, ge=1, description="steps of staleness above which at_hard_bound acts; none if not given"
    )
    at_hard_bound: AtHardBound = Field(
        default="wait", description="wait for a newer version, keep the old one, or use the scaled gradient"
    )


class PreconditionerSection(Section):
    """The second-order method; the names are those of `kfdist.Preconditioner`."""

    method: str | None = Field(
        default="rs-kfac",
        min_length=1,
        description='an inverter of kfdist.curvature.inverters; "auto" picks one per block; "none" leaves the '
        "optimizer alone, for comparisons",
    )
    methods: Methods | None = Field(
        default=None,
        description="methods by glob on module names, the first match wins; excludes preconditioner.method",
    )
    settings: Settings = Field(default_factory=lambda: {"rank": 128}, description="the inverter's own settings")
    damping: float = Field(default=0.03, gt=0, description="lambda of F + lambda I, at first")
    damping_decay: float = Field(
        default=1.0, gt=0, le=1, description="what an epoch multiplies the damping by, a step at a time; 1: nothing"
    )
    damping_epochs: Stages = Field(
        default=(), description="[epoch, damping] pairs: from that epoch on, that damping; excludes damping_decay"
    )
    fisher: Fisher = Field(
        default="empirical",
        description="which output gradients make the Fisher: those of the training loss, of labels sampled from the "
        "model, or of all labels",
    )
    weight_sharing: WeightSharing = Field(
        default="expand",
        description="how linear layers treat positions: each alone, or inputs averaged and gradients summed over them",
    )
    ema_decay: float = Field(
        default=0.95, ge=0, lt=1, description="what an update of the statistics keeps of the old ones"
    )
    factor_period: int = Field(default=2, ge=1, description="steps between two updates of the statistics")
    inverse_period: int = Field(
        default=10, ge=1, description="steps between two inversions of a block, a multiple of factor_period, at first"
    )
    inverse_period_epochs: CountStages = Field(
        default=(), description="[epoch, inverse_period] pairs: from that epoch on, that inverse_period"
    )
    kl_clip: float = Field(
        default=1e-2, ge=0, description="bound kappa of the squared step length in the Fisher's norm; 0 turns it off"
    )
    adoption: Literal["asap", "fixed-lag"] = Field(default="asap", description="when a finished inverse is taken up")
    lag: int | None = Field(
        default=None,
        ge=0,
        description='steps from statistics to adoption with adoption = "fixed-lag"; 0 is synchronous',
    )
    skip: Names = Field(default=(), description="globs of module names that stay with the plain gradient")
    wait_limit_seconds: float = Field(
        default=600.0,
        gt=0,
        description="the longest agreed wait before the run writes a checkpoint and ends, resumable",
    )
    examples_fraction: float = Field(default=1.0, gt=0, le=1, description="share of the examples that is measured")
    positions_fraction: float = Field(
        default=1.0, gt=0, le=1, description="share of the positions of a convolution or a sequence that is measured"
    )
    positions_budget: int | None = Field(
        default=None,
        ge=1,
        description="most positions of a convolution or a sequence that are measured per example; all if not given",
    )
    digest_period: int = Field(
        default=100, ge=0, description="steps between two comparisons of the ranks' parameters; 0: never"
    )
    staleness: StalenessSection = Field(default_factory=StalenessSection, description="bounds on staleness under asap")

    @property
    def inverts(self) -> bool:
        """Whether there is anything to invert."""
        return self.method != "none"

    @property
    def described(self) -> str:
        """The method, to be shown, such as "rs-kfac" or "conv*: rs-kfac, head: kfac"."""
        if self.methods is None:
            return str(self.method)
        return ", ".join(f"{pattern}: {entry['method']}" for pattern, entry in self.methods.items())

    @property
    def mode(self) -> Adoption:
        """When a finished inverse is taken up, with what goes with it."""
        if self.lag is not None:
            return FixedLag(self.lag, wait_limit_seconds=self.wait_limit_seconds)
        return Asap(**self.staleness.model_dump(), wait_limit_seconds=self.wait_limit_seconds)

    @model_validator(mode="before")
    @classmethod
    def _the_default_settings_are_the_default_methods(cls, table: Any) -> Any:
        if isinstance(table, dict) and "methods" in table:
            return {"method": None, "settings": {}, **table}
        return {"settings": {}, **table} if isinstance(table, dict) and "method" in table else table

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.method is None) == (self.methods is None):
            received = "neither method nor methods is given" if self.method is None else "both are given"
            raise ConfigError(f"{received}; give preconditioner.method or a table of methods", path="methods")
        if self.methods is not None and self.settings:
            reason = "they go with preconditioner.method; in a table of methods, write settings beside each `method`"
            raise ConfigError(f"is {self.settings!r}; {reason}", path="settings")
        if self.damping_epochs and self.damping_decay != 1.0:
            raise ConfigError(
                f"is {self.damping_decay} and damping_epochs is given too; give one of them", path="damping_decay"
            )
        if self.adoption == "asap" and self.lag is not None:
            raise ConfigError(
                f'is {self.lag}; it goes with adoption = "fixed-lag" only: set that, or remove lag', path="lag"
            )
        if self.adoption == "fixed-lag" and self.lag is None:
            raise ConfigError('is missing; adoption = "fixed-lag" needs it, such as lag = 5', path="lag")
        if self.lag is not None:
            self._refuse_bounds(self.lag)
        try:
            for period in self.inverse_periods:
                Schedule(factor_period=self.factor_period, inverse_period=period, groups=0)
            if isinstance(self.mode, Asap):
                self.mode.check(inverse_period=max(self.inverse_periods))
        except ConfigError as error:
            raise error if error.path == "inverse_period" else error.under("staleness") from None
        return self

    @property
    def inverse_periods(self) -> tuple[int, ...]:
        """`inverse_period`, and those that follow it."""
        return (self.inverse_period, *(period for _, period in self.inverse_period_epochs))

    def _refuse_bounds(self, lag: int) -> None:
        for name in ("soft_bound", "hard_bound"):
            if (bound := getattr(self.staleness, name)) is not None:
                raise ConfigError(
                    f'is {bound}; bounds go with adoption = "asap" only: under a fixed lag staleness is at most '
                    f"{max(self.inverse_periods) + lag} steps by construction; remove the bound",
                    path=f"staleness.{name}",
                )


class BundleSection(Section):
    """What each owner takes of a Ray node, and which nodes may have one."""

    cpus: float | None = Field(default=None, gt=0, description="CPUs of each owner; cluster.threads if not given")
    gpus: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="share of a GPU, and of its memory, on which each owner inverts; 0: on CPUs",
    )
    resources: Resources = Field(
        default_factory=dict, description="how much of Ray's custom resources each owner takes"
    )
    labels: Labels = Field(
        default_factory=dict,
        description='which labels its node has, as Ray\'s label selectors: "A100", "!A100", "in(A100, H100)"',
    )


class ClusterSection(Section):
    """The processes of a run."""

    workers: int = Field(default=2, ge=1, description="training ranks that `kfdist train` starts")
    owners: int = Field(default=2, ge=0, description="Ray actors that invert")
    owner_address: Literal["loopback", "node"] = Field(
        default="loopback",
        description="where owners listen: on loopback, or on their Ray node's address, for ranks of other machines",
    )
    owner_ports: Ports | None = Field(
        default=None,
        description="the first and the last port on which owners may listen, for firewalls; any if not given",
    )
    owner_strategy: Literal["SPREAD", "STRICT_SPREAD", "PACK", "STRICT_PACK"] = Field(
        default="SPREAD",
        description='how Ray places owners over the nodes of an existing cluster; with owner_address = "node"',
    )
    bundle: BundleSection = Field(
        default_factory=BundleSection, description="what each owner takes of a Ray node, and which nodes may have one"
    )
    threads: int = Field(
        default=1, ge=1, description="CPU threads of each rank and of each inversion; part of the run's numbers"
    )
    ray: RayAddress = Field(default="local", description="where Ray is")
    assignment: Literal["round_robin", "model_order", "lpt"] = Field(
        default="round_robin", description="how groups are dealt to owners"
    )
    link: Literal["service", "local"] = Field(
        default="service", description="service: owners invert; local: the ranks do it themselves"
    )
    job_deadline_seconds: float = Field(
        default=60.0, gt=0, description="how long one inversion may take before it is killed and retried"
    )
    group_timeout_seconds: float = Field(
        default=300.0, gt=0, description="how long a rank waits in a collective for the others"
    )

    @model_validator(mode="after")
    def _ports_rise(self) -> Self:
        if self.owner_ports is not None and self.owner_ports[0] > self.owner_ports[1]:
            raise ConfigError(f"is {list(self.owner_ports)}; write the first port, then the last", path="owner_ports")
        return self


class ControlSection(Section):
    """The controller."""

    address: Address = Field(default="127.0.0.1:7070", description="where the controller serves gRPC")
    metrics_address: Address = Field(
        default="127.0.0.1:9464", description="where the controller serves /metrics over HTTP"
    )
    database: FileName | None = Field(
        default=None, description="the controller's SQLite file; control.sqlite in the run directory if not given"
    )


class SecuritySection(Section):
    """What lets others reach the controller and the owners: TLS with certificates on both sides, and a token.

    Only places are named here: what is in the files never stands in a configuration.
    """

    certificates: FileName | None = Field(
        default=None, description="directory that `kfdist certs init` made, on every node; without it, all is loopback"
    )
    token_file: FileName | None = Field(
        default=None, description="the file with the token; `token` in the directory of certificates if not given"
    )

    @model_validator(mode="after")
    def _token_needs_certificates(self) -> Self:
        if self.token_file is not None and self.certificates is None:
            raise ConfigError(
                f"is {self.token_file!r}, and security.certificates is missing: a token travels over TLS only; give "
                "both, or neither",
                path="token_file",
            )
        return self

    def credentials(self, role: Role) -> Credentials | None:
        """Returns what a process of this role shows to others; None if nothing is configured."""
        return Credentials.at(role, self.certificates, self.token_file)


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


class Config(Section):
    """The whole configuration of a run."""

    run: RunSection = Field(default_factory=lambda: RunSection(steps=120))
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    preconditioner: PreconditionerSection = Field(default_factory=PreconditionerSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    control: ControlSection = Field(default_factory=ControlSection)
    security: SecuritySection = Field(default_factory=SecuritySection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)

    @model_validator(mode="after")
    def _service_needs_owners(self) -> Self:
        if self.cluster.link == "service" and self.cluster.owners < 1 and self.preconditioner.inverts:
            raise ConfigError(
                'is 0; link = "service" needs at least 1; link = "local" or method = "none" needs none',
                path="cluster.owners",
            )
        return self

    @model_validator(mode="after")
    def _others_need_security(self) -> Self:
        for name in ("address", "metrics_address"):
            address = getattr(self.control, name)
            if self.security.certificates is None and not is_loopback(split_address(address)[0]):
                raise ConfigError(f"is {address!r}; {UNPROTECTED}", path=f"control.{name}")
        if self.security.certificates is None and self.cluster.owner_address == "node":
            raise ConfigError(f'is "node"; {UNPROTECTED}', path="cluster.owner_address")
        return self
