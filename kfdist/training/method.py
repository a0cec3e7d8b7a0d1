"""From the preconditioner's section of a configuration to a plan, with the configuration's paths in what is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kfdist.capture.requests import Sampling
from kfdist.comm.together import on_rank_zero
from kfdist.config import Config, PreconditionerSection
from kfdist.config.toml import format_key
from kfdist.curvature.auto import Auto, MeasuredCosts, make_choice, measure_costs
from kfdist.curvature.by_width import ByWidth
from kfdist.curvature.inverter import AbstractInverter
from kfdist.errors import ConfigError
from kfdist.runtime.plan.planner import NONE, Method, Plan, make_plan, needs_costs
from kfdist.runtime.settings import Settings
from kfdist.training.copies import Copies
from kfdist.training.run_directory import read_costs


def inverse_periods(section: PreconditionerSection, *, steps_per_epoch: int, epoch_zero: int) -> dict[int, int]:
    """Returns the inverse periods by the step that each begins at; the arguments are those of `ByEpoch`."""
    begun = {0: section.inverse_period}
    for epoch, period in section.inverse_period_epochs:
        begun[max(0, epoch_zero + epoch * steps_per_epoch)] = period
    return begun


@dataclass(frozen=True, kw_only=True)
class ByEpoch:
    """A number as a function of the step; nothing of it needs saving.

    Attributes:
        first: What it is in epoch 0.
        decay: What an epoch multiplies it by, a step at a time.
        stages: Pairs of an epoch and the number from then on, in the place of the decay.
        steps_per_epoch: Steps of a pass over the data.
        epoch_zero: Step at which epoch 0 began, or would have at this number of ranks.
    """

    first: float
    decay: float
    stages: Sequence[tuple[int, float]]
    steps_per_epoch: int
    epoch_zero: int = 0

    def __call__(self, step: int) -> float:
        """Returns the number at step number `step`, counted from 0."""
        epoch = (step - self.epoch_zero) / self.steps_per_epoch
        reached = [value for begin, value in self.stages if epoch >= begin]
        return reached[-1] if reached else self.first * self.decay**epoch


def damping_of(section: PreconditionerSection, *, steps_per_epoch: int, epoch_zero: int = 0) -> ByEpoch:
    """Returns lambda as a function of the step; the arguments are those of `ByEpoch`."""
    first, decay, stages = section.damping, section.damping_decay, section.damping_epochs
    return ByEpoch(first=first, decay=decay, stages=stages, steps_per_epoch=steps_per_epoch, epoch_zero=epoch_zero)


def kl_clip_of(section: PreconditionerSection, *, steps_per_epoch: int, epoch_zero: int = 0) -> ByEpoch | None:
    """Returns kappa as a function of the step, None without a clip; the arguments are those of `ByEpoch`."""
    first, decay, stages = section.kl_clip, section.kl_clip_decay, section.kl_clip_epochs
    if not first:
        return None
    return ByEpoch(first=first, decay=decay, stages=stages, steps_per_epoch=steps_per_epoch, epoch_zero=epoch_zero)


def plan_of(config: Config, model: nn.Module, *, world_size: int, costs: MeasuredCosts | None) -> Plan:
    """Makes the plan that a configuration describes; its settings lack the learning rate.

    Args:
        config: The configuration.
        model: The model, on its device.
        world_size: How many ranks share a step.
        costs: What inversions cost, the same on all ranks; needed for "auto".

    Raises:
        ConfigError: The method can't invert the model's blocks, from this Fisher and in these periods.
    """
    section = config.preconditioner
    method = make_method(section)
    try:
        plan = make_plan(model, method, _settings_of(config), world_size=world_size, costs=costs)
    except ConfigError as error:
        renamed = {"method": "methods" if section.methods is not None else "method", "allow": "settings.allow"}
        raise error.at(renamed.get(error.path, error.path)).under("preconditioner") from None
    for group in plan.groups:
        try:
            for period in section.inverse_periods:
                group.inverter.update_period(section.factor_period, period)
        except ConfigError as error:
            patterns = method.items() if isinstance(method, Mapping) else ()
            entries = [f"methods.{format_key(pattern)}" for pattern, each in patterns if each is group.inverter]
            raise error.under(f"preconditioner.{(entries or ['settings'])[0]}") from None
    return plan


def agree_on_costs(config: Config, copies: Copies) -> MeasuredCosts | None:
    """Returns what "auto" chooses by: what inversions cost where the run began, as any copy has it, else on rank 0 now.

    All ranks must call it.

    Returns:
        The costs, the same on all ranks; None without "auto".

    Raises:
        ConfigError: There is no such method or setting, or a value isn't allowed.
        EnvironmentFault: What the run has kept can't be read.
    """
    if not needs_costs(make_method(config.preconditioner)):
        return None

    def look() -> dict[str, list[float]] | None:
        kept = read_costs(config.run.directory)
        return None if kept is None else kept.to_json()

    kept = next(filter(None, copies.on_leaders(look).values()), None)
    costs = kept or on_rank_zero(copies.communicator, lambda: measure_costs().to_json())
    return MeasuredCosts.from_json(costs)


def _settings_of(config: Config) -> Settings:
    section = config.preconditioner
    return Settings(
        damping=section.damping,
        ema_decay=section.ema_decay,
        factor_period=section.factor_period,
        inverse_period=section.inverse_period,
        fisher=section.fisher,
        weight_sharing=section.weight_sharing,
        sampling=Sampling(
            examples_fraction=section.examples_fraction,
            positions_fraction=section.positions_fraction,
            positions_budget=section.positions_budget,
        ),
        skip=section.skip,
        kl_clip=section.kl_clip or None,
        lr=None,
        adoption=section.mode,
        seed=config.run.seed,
        digest_period=section.digest_period,
    )


def make_method(section: PreconditionerSection) -> Method:
    """Makes what `kfdist.Preconditioner` takes as its method.

    Raises:
        ConfigError: There is no such method or setting, or a value isn't allowed.
    """
    if section.methods is not None:
        return {pattern: _entry_of(pattern, entry) for pattern, entry in section.methods.items()}
    if not section.inverts:
        return NONE
    try:
        return make_choice(section.method or "", **section.settings)
    except ConfigError as error:
        of_settings = error.path not in ("method", "settings", "")
        raise error.under("preconditioner.settings" if of_settings else "preconditioner") from None


def _entry_of(pattern: str, entry: Mapping[str, Any]) -> AbstractInverter | Auto | ByWidth:
    """Makes the method of one pattern; the entry holds its name beside its settings."""
    try:
        return make_choice(entry["method"], **{name: value for name, value in entry.items() if name != "method"})
    except ConfigError as error:
        entry_path = f"preconditioner.methods.{format_key(pattern)}"
        raise (error.at(entry_path) if error.path == "settings" else error.under(entry_path)) from None
