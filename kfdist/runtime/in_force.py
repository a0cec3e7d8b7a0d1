"""The settings in force: as configured, but for what users have changed while the run trains."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kfdist.errors import ConfigError
from kfdist.policies import tuning
from kfdist.policies.schedule import Schedule
from kfdist.policies.staleness import Adoption, Asap, FixedLag
from kfdist.policies.tuning import changed
from kfdist.runtime.plan.groups import BlockGroup
from kfdist.runtime.settings import Settings
from kfdist.types import InForce, Value

_ADOPTING = ("adoption", "lag", *tuning.STALENESS)
"""Settings that together say when a finished inverse is taken into use."""


class SettingsInForce:
    """What all ranks go by; it changes on agreed settings alone, and so is the same on all ranks at the same step.

    Args:
        configured: What the pipeline was told.
        groups: All groups, whose methods may have periods of their own.

    Attributes:
        settings: As configured, with the changes.
        changes: What differs from the configuration, by name (`kfdist.policies.tuning`).
        fixed: Why a setting can't be changed, by name, where it can't.
        stand_in: Gives lambda in the place of the settings; None where they do.
    """

    def __init__(self, configured: Settings, groups: Sequence[BlockGroup]) -> None:
        self._configured = configured
        self._groups = groups
        self.settings = configured
        self.changes: dict[str, Value] = {}
        self.fixed: dict[str, str] = {}
        self.stand_in: Callable[[], float] | None = None
        if not groups:
            self.fixed = dict.fromkeys(tuning.NAMES, "the run has no second-order method whose setting this is")
        elif configured.kl_clip is None and configured.lr is None:
            self.fixed = {"kl_clip": "it was made without a clip, and without a learning rate to clip by"}
        self._ignored: dict[str, str] = {}
        if groups and all(group.inverter.produces.normalised for group in groups):
            names = ", ".join(sorted({group.inverter.name for group in groups}))
            self._ignored = {"damping": f"{names}, the run's only method, has none: its steps have Adam's length"}
        self.fixed |= self._ignored
        self._idle = dict(self._ignored)
        if groups and not any(group.obeys_damping for group in groups):
            names = ", ".join(sorted({group.inverter.name for group in groups}))
            self._idle["soft_bound"] = f"beyond it damping is raised, which directions of {names} don't obey"

    def without_effect(self, name: str) -> str:
        """Returns why a setting does nothing in this run; nothing where it does something."""
        return self._idle.get(name, "")

    def damping(self, step: int) -> float:
        """Returns lambda at `step`: the stand-in's, what users set last, or as configured.

        Raises:
            ConfigError: A schedule gave something else than a positive, finite number.
        """
        return self.settings.damping_at(step) if self.stand_in is None else _checked(self.stand_in(), step)

    def kl_clip(self, step: int) -> float | None:
        """Returns kappa at `step`: what users set last, or as configured; None where nothing is clipped.

        Raises:
            ConfigError: A schedule gave something else than a positive, finite number, or None or 0.
        """
        return self.settings.kl_clip_at(step)

    def take(self, said: Mapping[str, Value | None]) -> str:
        """Takes up what users say of the settings, all of it or nothing.

        Returns:
            Why they stay as they were; nothing where they don't.
        """
        changes = changed(self.changes, said)
        if changes == self.changes:
            return ""
        try:
            self.settings = self._settings_of(changes, said=said)
        except ConfigError as error:
            return str(error)
        self.changes = changes
        return ""

    def _settings_of(self, changes: Mapping[str, Value], *, said: Mapping[str, Value | None]) -> Settings:
        """Returns the settings after some changes.

        Raises:
            ConfigError: One can't be changed, or they don't fit together.
        """
        for name, reason in self.fixed.items():
            if changes.get(name) != self.changes.get(name):
                raise ConfigError(f"can't be changed: {reason}", path=name)
        settings = self._with(changes)
        if said.get("soft_bound") and (reason := self.without_effect("soft_bound")):
            raise ConfigError(f"would do nothing: {reason}; set hard_bound", path="soft_bound")
        if said.keys() == {"inverse_period"} and said["inverse_period"] is not None:
            self._refuse_without_effect(settings)
        return settings

    def told(self, step: int) -> InForce:
        """Returns what the controller is told of it at `step`: without the value of a schedule that gives none.

        Rank 0 alone tells it, also before the step: there a bad schedule is refused on all ranks at once.
        """
        settings, adoption = self.settings, self.settings.adoption
        values: dict[str, Value] = {}
        with suppress(ConfigError):
            values["damping"] = settings.damping_at(step)
        with suppress(ConfigError):
            values["kl_clip"] = settings.kl_clip_at(step) or 0.0
        values |= {
            "factor_period": settings.factor_period,
            "inverse_period": settings.inverse_period_at(step),
        }
        if isinstance(adoption, FixedLag):
            values |= {"adoption": "fixed-lag", "lag": adoption.lag}
        else:
            bounds = {"soft_bound": adoption.soft_bound or 0, "hard_bound": adoption.hard_bound or 0}
            values |= {"adoption": "asap", **bounds, "at_hard_bound": adoption.at_hard_bound}
        inverters = [group.inverter for group in self._groups]
        return InForce(
            values=values,
            fixed=self.fixed,
            job_periods=tuple(sorted({each.own_period for each in inverters if each.own_period is not None})),
            late_damping=tuple(sorted({each.name for each in inverters if not each.produces.damping_at_apply})),
            changed=tuple(name for name in self.changes if name in values),
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns what users have changed."""
        return {"changes": dict(self.changes)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned; newer settings replace it.

        Raises:
            ConfigError: What users had changed doesn't go with the configuration of now.
        """
        self.changes, self.settings = self._of_state(state)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raises what `load_state_dict` would raise, and changes nothing."""
        self._of_state(state)

    def _of_state(self, state: Mapping[str, Any]) -> tuple[dict[str, Value], Settings]:
        # Of before these were refused.
        said = {name: value for name, value in state["changes"].items() if name not in self._ignored}
        changes = changed(self.changes, said)
        try:
            return changes, self._settings_of(changes, said={})
        except ConfigError as error:
            raise ConfigError(
                f"users had changed settings of the run, as the checkpoint has them, and that doesn't go with the "
                f"configuration any more: {error}; configure what goes with it, or start a new run"
            ) from error

    def _with(self, changes: Mapping[str, Value]) -> Settings:
        """Returns the configured settings with these changes, checked."""
        given: dict[str, Any] = {name: value for name, value in changes.items() if name not in _ADOPTING}
        if "kl_clip" in given:
            given["kl_clip"] = given["kl_clip"] or None
        settings = replace(self._configured, **given, adoption=_adoption(self._configured.adoption, changes))
        for schedule in settings.schedules(groups=0):
            self._periods(schedule)
        return settings

    def _refuse_without_effect(self, settings: Settings) -> None:
        """Refuses an inverse period by which no group is inverted more or less often than it is."""
        if any(group.inverter.online for group in self._groups):
            return  # their jobs between two inversions are others than those at them
        before, after = ([self._periods(each) for each in one.schedules(groups=0)] for one in (self.settings, settings))
        if before == after:
            periods = " and ".join(map(str, sorted(set(after[-1]))))
            raise ConfigError(
                f"would change nothing: blocks are inverted every {periods} steps, as their methods have it "
                "(basis_period); give a shorter one, or factor_period beside it",
                path="inverse_period",
            )

    def _periods(self, schedule: Schedule) -> list[int]:
        return [group.inverter.update_period(schedule.factor_period, schedule.inverse_period) for group in self._groups]


def _checked(damping: float, step: int) -> float:
    if not (math.isfinite(damping) and damping > 0.0):
        raise ConfigError(f"the damping is {damping!r} at step {step}; a positive, finite number is needed")
    return damping


def _adoption(configured: Adoption, changes: Mapping[str, Value]) -> Adoption:
    """Returns when a finished inverse is taken into use, after some changes."""
    exact = changes.get("adoption", "asap" if isinstance(configured, Asap) else "fixed-lag") == "fixed-lag"
    wait_limit = configured.wait_limit_seconds
    bounds: dict[str, Any] = {name: changes[name] or None for name in tuning.STALENESS if name in changes}
    if not exact:
        base = configured if isinstance(configured, Asap) else Asap(wait_limit_seconds=wait_limit)
        return replace(base, **bounds)
    lag = changes.get("lag", configured.lag if isinstance(configured, FixedLag) else None)
    if not isinstance(lag, int):
        raise ConfigError('is missing; adoption = "fixed-lag" needs it, such as lag = 5', path="lag")
    return FixedLag(lag, wait_limit_seconds=wait_limit)
