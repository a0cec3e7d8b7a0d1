"""When all ranks take a finished inverse into use, and what they do with one that has grown old: pure decisions."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from kfdist import checks
from kfdist.errors import ConfigError

SMALLEST_DELAY = 2
"""Fewest steps from an inversion's statistics to its adoption under asap, with any number of ranks and over any link.

A result that is there in the step that ships its statistics is announced in the table which that step starts. The next
step completes that table, broadcasts the result and, where it has arrived by the end, says so in its own table. The
step after completes that one, and all ranks adopt. `usual_delay` is what a run has to count on.
"""


def usual_delay(*, ranks: int, gpu: bool) -> int:
    """Returns the steps from statistics to adoption of an inversion that takes less than a step.

    One step until its result is taken in, which then is announced, broadcast and adopted; several ranks need one more
    until all have it. Statistics of a GPU are shipped a step late, for no step waits until it has finished them.

    Args:
        ranks: How many there are.
        gpu: Whether they compute on GPUs.
    """
    return SMALLEST_DELAY + 1 + (ranks > 1) + gpu


def oldest(inverse_period: int, delay: int) -> int:
    """Returns how many steps old an inverse gets: it is in use until the step before its successor is adopted.

    Args:
        inverse_period: Steps between two inversions of a group.
        delay: Steps from an inversion's statistics to its adoption.
    """
    return inverse_period + delay - 1


AtHardBound = Literal["wait", "keep", "fallback"]
"""What happens when a snapshot is older than the hard bound."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the policy says of one group in one step.

    Attributes:
        damping_factor: By how much the damping is raised, 1 up to the soft bound.
        beyond: What the hard bound calls for; None up to it.
    """

    damping_factor: float = 1.0
    beyond: AtHardBound | None = None

    @property
    def wait(self) -> bool:
        """Whether to wait, with all ranks, for a newer version first."""
        return self.beyond == "wait"

    @property
    def fallback(self) -> bool:
        """Whether to use V / (lambda + tau) instead of the snapshot."""
        return self.beyond == "fallback"

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is in force when the snapshot is used now, for counting: staleness is never passed over in silence.

        "kept" also stands for a wait that brought nothing, because the awaited inversion failed or none was under way.
        """
        raised = ("damping_raised",) if self.damping_factor != 1.0 else ()
        if self.beyond is None:
            return raised
        return (*raised, "fallback" if self.fallback else "kept")

    def followed(self, *, damps: bool, scales: bool) -> "Decision":
        """Returns what a method can do of it, so that nothing is counted that isn't done.

        Args:
            damps: Whether its directions obey lambda when it is applied; else there is nothing to raise.
            scales: Whether the scaled gradient has its directions' size; else it keeps the snapshot.
        """
        falls_back = self.fallback and scales
        return Decision(
            damping_factor=self.damping_factor if damps or falls_back else 1.0,
            beyond="keep" if self.fallback and not scales else self.beyond,
        )


NOTHING = Decision()
"""What there is to say of nearly all groups in nearly all steps."""


@dataclass(frozen=True)
class FixedLag:
    """Adoption of version v by all ranks at step v + lag, waited for; `FixedLag(0)` is synchronous K-FAC.

    Nothing that depends on time changes a number: two runs with equal inputs are bitwise equal.

    Attributes:
        lag: Steps from an inversion's statistics to its adoption.
        wait_limit_seconds: Longest agreed wait for an inversion; then the step raises `Interrupted` on all ranks.

    Raises:
        ConfigError: A value is out of range.
    """

    lag: int
    wait_limit_seconds: float = field(default=600.0, kw_only=True)

    def __post_init__(self) -> None:
        checks.count("lag", self.lag, least=0, hint="steps from statistics to adoption")
        _check_wait_limit(self.wait_limit_seconds)

    def decide(self, staleness: int) -> Decision:
        """Asks for nothing: staleness is at most inverse_period + lag - 1 by construction."""
        del staleness
        return NOTHING


@dataclass(frozen=True, kw_only=True)
class Asap:
    """Adoption of a version by all ranks as soon as all have it, with bounds on the staleness that this allows.

    Staleness reaches inverse_period + delay - 1 by construction (the snapshot in use ages until its successor is
    adopted), so a bound below that, with the smallest delay there is, is refused by `check`.

    Attributes:
        soft_bound: Steps of staleness above which damping grows in proportion to the excess: lambda * staleness /
            soft_bound. Stale curvature is compensated by damping. None: never.
        hard_bound: Steps of staleness above which `at_hard_bound` applies. None: never.
        at_hard_bound: "wait" for a newer version, "keep" the old snapshot (visibly), or "fallback" to V / (lambda +
            tau) with tau = tr(A) tr(G) / (p q) of the last adopted version, which keeps the step's size.
        wait_limit_seconds: Longest agreed wait for an inversion (of the first step, or at the hard bound); then the
            step raises `Interrupted` on all ranks. A resumed run waits as long for the first inverses that it asks
            for, and then goes on with those that it has.

    Raises:
        ConfigError: A value is out of range, or the soft bound is above the hard one.
    """

    soft_bound: int | None = None
    hard_bound: int | None = None
    at_hard_bound: AtHardBound = "wait"
    wait_limit_seconds: float = 600.0

    def __post_init__(self) -> None:
        for name in ("soft_bound", "hard_bound"):
            if getattr(self, name) is not None:
                checks.count(name, getattr(self, name), least=1, hint="steps, or None for no bound")
        checks.choice("at_hard_bound", self.at_hard_bound, get_args(AtHardBound))
        _check_wait_limit(self.wait_limit_seconds)
        if self.soft_bound is not None and self.hard_bound is not None and self.soft_bound > self.hard_bound:
            raise ConfigError(
                f"is {self.soft_bound}, above hard_bound = {self.hard_bound}; make it the smaller one",
                path="soft_bound",
            )

    def check(self, *, inverse_period: int) -> None:
        """Refuses bounds that normal operation would break.

        Args:
            inverse_period: Steps between two inversions of a group; of the run, where methods have shorter periods.

        Raises:
            ConfigError: With the bound's name as path, and the smallest legal value.
        """
        smallest = oldest(inverse_period, SMALLEST_DELAY)
        for name in ("soft_bound", "hard_bound"):
            bound = getattr(self, name)
            if bound is not None and bound < smallest:
                raise ConfigError(
                    f"is {bound}; an inverse is in use until its successor is adopted, at the earliest "
                    f"{SMALLEST_DELAY} steps after the successor's statistics: with inverse_period = {inverse_period} "
                    f"staleness reaches {smallest} steps however fast owners are (where methods have shorter periods "
                    "of their own, a bound goes by the run's all the same: give a shorter inverse_period with it); the "
                    f"smallest legal value is {smallest}",
                    path=name,
                )

    def decide(self, staleness: int) -> Decision:
        """Decides for a group whose snapshot is `staleness` steps old; the same on all ranks."""
        if self.soft_bound is None and self.hard_bound is None:
            return NOTHING
        factor = 1.0
        if self.soft_bound is not None and staleness > self.soft_bound:
            factor = staleness / self.soft_bound
        exceeded = self.hard_bound is not None and staleness > self.hard_bound
        return Decision(damping_factor=factor, beyond=self.at_hard_bound if exceeded else None)


Adoption = FixedLag | Asap
"""When a finished inverse is taken into use."""


def _check_wait_limit(seconds: float) -> None:
    checks.number("wait_limit_seconds", seconds, above=0, finite=False)
