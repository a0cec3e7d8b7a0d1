"""What a preconditioner is told, and what its steps report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import get_args

from kfdist import checks
from kfdist.capture.requests import Sampling
from kfdist.errors import ConfigError
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import Adoption, Asap, FixedLag
from kfdist.runtime.apply.rates import Scalar, given_at, number_of
from kfdist.types import Fisher, RunSettings, WeightSharing


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a preconditioner is told, equal on all ranks; `kfdist.Preconditioner` documents each field.

    Raises:
        ConfigError: A value is out of range, or two don't fit together.
    """

    damping: Scalar
    ema_decay: float
    factor_period: int
    inverse_period: int | Mapping[int, int]
    fisher: Fisher
    weight_sharing: WeightSharing
    sampling: Sampling
    skip: tuple[str, ...]
    kl_clip: Scalar | None
    lr: Scalar | None
    adoption: Adoption
    seed: int
    digest_period: int

    def __post_init__(self) -> None:
        if not callable(self.damping):
            checks.number("damping", self.damping, above=0, hint="or a callable of the step")
        checks.number("ema_decay", self.ema_decay, least=0, below=1)
        periods = [schedule.inverse_period for schedule in self.schedules(groups=0)]
        checks.choice("fisher", self.fisher, get_args(Fisher))
        checks.choice("weight_sharing", self.weight_sharing, get_args(WeightSharing))
        if not isinstance(self.sampling, Sampling):
            raise ConfigError(f"is {self.sampling!r}; kfdist.Sampling(...) is needed", path="sampling")
        if self.kl_clip is not None and not callable(self.kl_clip):
            hint = "or a callable of the step, or None, which turns the clip off"
            checks.number("kl_clip", self.kl_clip, above=0, hint=hint)
        if self.lr is not None and not callable(self.lr):
            checks.number("lr", self.lr, least=0, hint="or a callable of the step")
        if not isinstance(self.adoption, Adoption):
            raise ConfigError(
                f"is {self.adoption!r}; 'asap', kfdist.Asap(...) or kfdist.FixedLag(k) is needed", path="adoption"
            )
        if isinstance(self.adoption, Asap):
            self.adoption.check(inverse_period=max(periods))
        checks.count("seed", self.seed, least=0)
        checks.count("digest_period", self.digest_period, least=0, hint="steps between two digests; 0 for none")

    @property
    def lag(self) -> int | None:
        """Steps from an inversion's statistics to its adoption; None under asap."""
        return self.adoption.lag if isinstance(self.adoption, FixedLag) else None

    def schedules(self, groups: int, *, together: bool = False) -> list[Schedule]:
        """Returns when each of `groups` groups is folded, all of them `together` or not, and inverted.

        Foldings and inversions of the groups are spread over their periods. An inversion comes at a folding of its
        group: where they fold together, several groups are inverted at one step.
        """
        given = self.inverse_period
        stages = dict(given) if isinstance(given, Mapping) else {0: given}
        begins = [checks.count("inverse_period", begin, least=0, hint="the step it begins at") for begin in stages]
        if begins[:1] != [0] or begins != sorted(begins):
            raise ConfigError(
                f"begins at the steps {begins}; give rising ones, the first of them 0", path="inverse_period"
            )
        return [
            Schedule(
                factor_period=self.factor_period, inverse_period=period, groups=groups, together=together, begin=begin
            )
            for begin, period in stages.items()
        ]

    def inverse_period_at(self, step: int) -> int:
        """Returns the steps between two inversions at `step`."""
        reached = [schedule.inverse_period for schedule in self.schedules(groups=0) if schedule.begin <= step]
        return reached[-1]

    def damping_at(self, step: int) -> float:
        """Returns lambda at `step`, as its schedule gives it.

        Raises:
            ConfigError: The schedule failed, or gave no positive, finite number.
        """
        return _positive("damping", given_at("damping", self.damping, step), step)

    def kl_clip_at(self, step: int) -> float | None:
        """Returns kappa at `step`, as its schedule gives it; None where nothing is clipped: it gave None or 0.

        Raises:
            ConfigError: The schedule failed, or gave neither that nor a positive, finite number.
        """
        given = given_at("kl_clip", self.kl_clip, step)
        return None if given is None or number_of(given) == 0.0 else _positive("kl_clip", given, step)

    def canonical(self, step: int) -> dict[str, str]:
        """Returns every field as text, for ranks to compare: schedules by their value at `step`, or how they fail."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _described(name, value, step) for name, value in values.items()}


def _described(name: str, value: object, step: int) -> str:
    try:
        return repr(given_at(name, value, step))
    except ConfigError as error:
        return str(error)


def _positive(name: str, value: object, step: int) -> float:
    number = number_of(value)
    if not (math.isfinite(number) and number > 0.0):
        raise ConfigError(f"the {name} schedule gave {value!r} at step {step}; a positive, finite number is needed")
    return number


@dataclass(frozen=True, kw_only=True)
class JobTerms:
    """What all jobs of one start say beside their content.

    Attributes:
        run: The run's name.
        epoch: The start of the run.
        fingerprint: What the numbers of whoever inverts depend on; empty where the ranks can't all tell alike, and
            no fixed lag is possible.
        deadline_seconds: How long one inversion may run.
    """

    run: str
    epoch: int
    fingerprint: str
    deadline_seconds: float


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one step did; equal on all ranks but for the seconds.

    Attributes:
        step: The step, from 0.
        settings: What users ask for, as agreed.
        stop: Whether all ranks know that a stop was requested.
        adopted: (group, version) swapped in.
        waited_seconds: Spent in agreed waits.
        phase_seconds: Host seconds by phase.
    """

    step: int
    settings: RunSettings
    stop: bool
    adopted: tuple[tuple[str, int], ...]
    waited_seconds: float
    phase_seconds: Mapping[str, float]
