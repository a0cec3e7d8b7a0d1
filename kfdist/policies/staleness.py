"""What to do with an inverse that has grown old: a pure policy from a status to a decision."""

from dataclasses import dataclass
from enum import StrEnum

from kfdist import checks
from kfdist.errors import ConfigError

SMALLEST_DELAY = 3
"""Fewest steps from an inversion's statistics to its adoption under asap: announce, broadcast, agree on receipt."""


class AtHardBound(StrEnum):
    """What happens when a snapshot is older than the hard bound."""

    WAIT = "wait"
    KEEP = "keep"
    FALLBACK = "fallback"


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
        return self.beyond is AtHardBound.WAIT

    @property
    def fallback(self) -> bool:
        """Whether to use V / (lambda + tau) instead of the snapshot."""
        return self.beyond is AtHardBound.FALLBACK

    @property
    def reasons(self) -> tuple[str, ...]:
        """What is in force when the snapshot is used now, for counting: staleness is never passed over in silence.

        "kept" also stands for a wait that brought nothing, because the awaited inversion failed or none was under way.
        """
        raised = ("damping_raised",) if self.damping_factor != 1.0 else ()
        if self.beyond is None:
            return raised
        return (*raised, "fallback" if self.fallback else "kept")


@dataclass(frozen=True, kw_only=True)
class StalenessPolicy:
    """Bounds on staleness, in steps, for `adoption="asap"`.

    Staleness reaches inverse_period + delay by construction (the snapshot in use ages until its successor is
    adopted), so a bound below that is refused by `check`.

    Attributes:
        soft_bound: Above it, damping grows in proportion to the excess: lambda * staleness / soft_bound. Stale
            curvature is compensated by damping. None: never.
        hard_bound: Above it, `at_hard_bound` applies. None: never.
        at_hard_bound: "wait" for a newer version, "keep" the old snapshot (visibly), or "fallback" to V / (lambda +
            tau) with tau = tr(A) tr(G) / (p q) of the last adopted version, which keeps the step's size.
    """

    soft_bound: int | None = None
    hard_bound: int | None = None
    at_hard_bound: AtHardBound = AtHardBound.WAIT

    def __post_init__(self) -> None:
        chosen = checks.choice("at_hard_bound", self.at_hard_bound, [str(each) for each in AtHardBound])
        object.__setattr__(self, "at_hard_bound", AtHardBound(chosen))

    @property
    def active(self) -> bool:
        """Whether any bound is set."""
        return self.soft_bound is not None or self.hard_bound is not None

    def check(self, *, inverse_period: int, lag: int | None = None, delay: int = SMALLEST_DELAY) -> None:
        """Refuses bounds that normal operation would break, or that a fixed lag leaves nothing to do.

        Args:
            inverse_period: Steps between two inversions of a group.
            lag: Steps from statistics to adoption under a fixed lag; None under "asap".
            delay: Fewest steps between an inversion's statistics and its adoption by all ranks under "asap".

        Raises:
            ConfigError: With the bound's name as path, and the smallest legal value.
        """
        smallest = inverse_period + delay
        for name in ("soft_bound", "hard_bound"):
            bound = getattr(self, name)
            if bound is None:
                continue
            if lag is not None:
                raise ConfigError(
                    f"is {bound}; bounds go with adoption = 'asap' only: under a fixed lag staleness is at most "
                    f"{inverse_period + lag} steps by construction; remove the bound",
                    path=name,
                )
            if bound < smallest:
                raise ConfigError(
                    f"is {bound}; staleness reaches inverse_period + delay = {inverse_period} + {delay} steps by "
                    f"construction; the smallest legal value is {smallest}",
                    path=name,
                )
        if self.soft_bound is not None and self.hard_bound is not None and self.soft_bound > self.hard_bound:
            raise ConfigError(
                f"is {self.soft_bound}, above hard_bound = {self.hard_bound}; make it the smaller one",
                path="soft_bound",
            )

    def decide(self, staleness: int) -> Decision:
        """Decides for a group whose snapshot is `staleness` steps old; the same on all ranks."""
        factor = 1.0
        if self.soft_bound is not None and staleness > self.soft_bound:
            factor = staleness / self.soft_bound
        exceeded = self.hard_bound is not None and staleness > self.hard_bound
        return Decision(damping_factor=factor, beyond=self.at_hard_bound if exceeded else None)
