"""When a group's statistics are folded and when it is inverted: pure functions of the step.

Periods that change are schedules one after another; each begins as the first one does, with all groups.

Every rank asks the same questions and gets the same answers, so every rank enters every collective.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from kfdist import checks
from kfdist.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The periods of a run.

    Attributes:
        factor_period: Steps between two foldings of a group.
        inverse_period: Steps between two inversions of a group, a multiple of `factor_period`.
        groups: How many groups share the work; their phases spread inversions over `inverse_period` and foldings over
            `factor_period`.
        together: Whether all groups are folded at the same steps, so that the others measure nothing.
        begin: The step from which on it holds.

    Raises:
        ConfigError: A period is below 1 or `inverse_period` is no multiple of `factor_period`.
    """

    factor_period: int
    inverse_period: int
    groups: int
    together: bool = False
    begin: int = 0

    def __post_init__(self) -> None:
        for name in ("factor_period", "inverse_period"):
            checks.count(name, getattr(self, name), least=1, hint="steps")
        if self.inverse_period % self.factor_period:
            below = max(self.factor_period, self.inverse_period - self.inverse_period % self.factor_period)
            raise ConfigError(
                f"is {self.inverse_period}, which is no multiple of factor_period = {self.factor_period}; take {below} "
                f"or {below + self.factor_period}, so that each inversion sees a fresh folding",
                path="inverse_period",
            )

    def phase(self, group: int) -> int:
        """Returns the step, from `begin` and modulo `inverse_period`, at which group number `group` is inverted."""
        return phase_of(group, max(self.groups, 1), self.factor_period, self.inverse_period, self.together)

    def folds(self, group: int, step: int) -> bool:
        """Says whether the group's statistics are folded at `step`; all are at `begin`."""
        return self.due(group, step, self.factor_period)

    def inverts(self, group: int, step: int) -> bool:
        """Says whether the group is inverted at `step`; all are at `begin`."""
        return self.due(group, step, self.inverse_period)

    def due(self, group: int, step: int, period: int) -> bool:
        """Says whether something the group does every `period` steps, which divides `inverse_period`, is due."""
        return step == self.begin or (step - self.begin - self.phase(group)) % period == 0

    def count_until(self, group: int, step: int, period: int) -> int:
        """Returns how often something done every `period` steps was due in steps `begin` to `step`, both included."""
        phase, step = self.phase(group) % period, step - self.begin
        after_first = (step - phase) // period + 1 if step >= phase else 0
        return after_first if phase == 0 else after_first + 1


@lru_cache(maxsize=8192)  # asked several times a group and step
def phase_of(group: int, groups: int, factor_period: int, inverse_period: int, together: bool) -> int:
    """Returns a group's phase: about `group / groups` of the inverse period, at a step where few others fold.

    A group's exact share of the period is `whole` foldings and a remainder of one. Where the numbers of groups and of
    foldings have a common divisor, every remainder recurs so many times, and all groups that have it would fold at the
    same steps: 10 groups all at once, where a period has 10 foldings. So each time it recurs it is moved on by another
    part of the distance to the next remainder; up and down, so that neighbours stay about a share apart.
    """
    foldings = inverse_period // factor_period
    whole, remainder = divmod(group * foldings, groups)
    if together:
        return whole * factor_period
    rounds = gcd(foldings, groups)
    turn = group * rounds // groups
    moved = 2 * turn if 2 * turn < rounds else 2 * (rounds - turn) - 1
    return whole * factor_period + factor_period * (remainder + moved) // groups
