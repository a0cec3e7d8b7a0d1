"""How gradients are preconditioned: the sections preconditioner and preconditioner.staleness.

Every `*_period` counts training steps; other units are in the names.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from kfdist.config.fields import CountStages, Methods, Names, Section, Settings, Stages
from kfdist.errors import ConfigError
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import Adoption, Asap, AtHardBound, FixedLag, oldest
from kfdist.types import MAX_STEPS, Fisher, WeightSharing

BY_WIDTH = "by-width"
"""The method's name that chooses by the blocks' width, `kfdist.ByWidth`; a test compares."""


_DAMPING_KEYS = ("damping", "damping_decay", "damping_epochs")


class StalenessSection(Section):
    """What happens under `asap` when the inverse in use gets old; the names are those of `kfdist.Asap`."""

    soft_bound: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="steps of staleness above which damping is raised; none if not given",
    )
    hard_bound: int | None = Field(
        default=None,
        ge=1,
        le=MAX_STEPS,
        description="steps of staleness above which at_hard_bound acts; none if not given",
    )
    at_hard_bound: AtHardBound = Field(
        default="wait", description="wait for a newer version, keep the old one, or use the scaled gradient"
    )


class PreconditionerSection(Section):
    """The second-order method; the names are those of `kfdist.Preconditioner`."""

    method: str | None = Field(
        default="by-width",
        min_length=1,
        description='an inverter of kfdist.curvature.inverters; "by-width" has one for blocks up to 1,024 wide '
        '(`dense`) and one for wider ones (`wide`), both ekfac-adam by default; "auto" picks by '
        'measured cost; "none" leaves the optimizer alone, for comparisons. '
        "rs-kfac for optimizers of torch.optim",
    )
    methods: Methods | None = Field(
        default=None,
        description="methods by glob on module names, the first match wins; excludes preconditioner.method",
    )
    settings: Settings = Field(
        default_factory=lambda: {
            "dense": "ekfac-adam",
            "dense_settings": {"basis_period": 20},
            "wide": "ekfac-adam",
        },
        description="the method's own settings; without basis_period beside a period that is given",
    )
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
        default=0.8,
        ge=0,
        lt=1,
        description="what an update of the statistics keeps of the old ones; 0.95 with a method that is given",
    )
    factor_period: int = Field(
        default=10,
        ge=1,
        le=MAX_STEPS,
        description="steps between two updates of the statistics; 2 for optimizers of torch.optim",
    )
    inverse_period: int = Field(
        default=100,
        ge=1,
        le=MAX_STEPS,
        description="steps between two inversions of a block, a multiple of factor_period, at first; 10 for optimizers "
        "of torch.optim",
    )
    inverse_period_epochs: CountStages = Field(
        default=(), description="[epoch, inverse_period] pairs: from that epoch on, that inverse_period"
    )
    kl_clip: float = Field(
        default=0.0,
        ge=0,
        description="bound kappa of the squared step length in the Fisher's norm; 0 turns it off; 0.01 for optimizers "
        "of torch.optim",
    )
    kl_clip_decay: float = Field(
        default=1.0, gt=0, le=1, description="what an epoch multiplies kl_clip by, a step at a time; 1: nothing"
    )
    kl_clip_epochs: Stages = Field(
        default=(), description="[epoch, kl_clip] pairs: from that epoch on, that kl_clip; excludes kl_clip_decay"
    )
    adoption: Literal["asap", "fixed-lag"] = Field(default="asap", description="when a finished inverse is taken up")
    lag: int | None = Field(
        default=None,
        ge=0,
        le=MAX_STEPS,
        description='steps from statistics to adoption with adoption = "fixed-lag"; 0 is synchronous',
    )
    skip: Names = Field(default=(), description="globs of module names that stay with the plain gradient")
    wait_limit_seconds: float = Field(
        default=600.0,
        gt=0,
        description="the longest agreed wait before the run writes a checkpoint and ends, resumable",
    )
    examples_fraction: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the examples that is measured; with none of these three given, as many rows as 5 % "
        "of the layer's forward and backward pays for",
    )
    positions_fraction: float | None = Field(
        default=None, gt=0, le=1, description="share of the positions of a convolution or a sequence that is measured"
    )
    positions_budget: int | None = Field(
        default=None,
        ge=1,
        description="most positions of a convolution or a sequence that are measured per example",
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
    def named_methods(self) -> list[str]:
        """The methods that are named, here or in the table, and those that "by-width" chooses from."""
        entries = [{**self.settings, "method": self.method}] if self.methods is None else list(self.methods.values())
        fields = ("method", "dense", "wide")
        return [
            str(entry[name])
            for entry in entries
            for name in fields
            if name in entry and (name == "method" or entry["method"] == BY_WIDTH)
        ]

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

    @property
    def kl_clip_schedule(self) -> str:
        """The key of a schedule of `kl_clip`; empty where there is none."""
        return "kl_clip_epochs" if self.kl_clip_epochs else "kl_clip_decay" if self.kl_clip_decay != 1.0 else ""

    @property
    def damping_given(self) -> str:
        """The key of a damping other than the default; empty where there is none."""
        fields = type(self).model_fields
        changed = (key for key in _DAMPING_KEYS if getattr(self, key) != fields[key].default)
        return next((f"preconditioner.{key}" for key in changed), "")

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
        self._check_schedule("damping", self.damping_decay, self.damping_epochs)
        self._check_schedule("kl_clip", self.kl_clip_decay, self.kl_clip_epochs)
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

    @staticmethod
    def _check_schedule(name: str, decay: float, stages: Sequence[object]) -> None:
        if stages and decay != 1.0:
            raise ConfigError(f"is {decay} and {name}_epochs is given too; give one of them", path=f"{name}_decay")

    @property
    def inverse_periods(self) -> tuple[int, ...]:
        """`inverse_period`, and those that follow it."""
        return (self.inverse_period, *(period for _, period in self.inverse_period_epochs))

    def _refuse_bounds(self, lag: int) -> None:
        for name in ("soft_bound", "hard_bound"):
            if (bound := getattr(self.staleness, name)) is not None:
                raise ConfigError(
                    f'is {bound}; bounds go with adoption = "asap" only: under a fixed lag staleness is at most '
                    f"{oldest(max(self.inverse_periods), lag)} steps by construction; remove the bound",
                    path=f"staleness.{name}",
                )
