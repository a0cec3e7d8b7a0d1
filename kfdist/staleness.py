"""What to do with an inverse that has grown old: a pure policy from a status to a decision."""

from dataclasses import dataclass
from enum import StrEnum

from kfdist.errors import ConfigError


class AtHardBound(StrEnum):
    """What happens when a snapshot is older than the hard bound."""

    WAIT = "wait"
    KEEP = "keep"
    FALLBACK = "fallback"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one group does this step.

    Attributes:
        damping_factor: By how much the damping is raised, 1 below the soft bound.
        wait: Whether to wait, with all ranks, for a newer version first.
        fallback: Whether to use V / (lambda + tau) instead of the snapshot.
        in_force: Whether the policy changes anything; such steps are counted, never silent.
    """

    damping_factor: float = 1.0
    wait: bool = False
    fallback: bool = False

    @property
    def in_force(self) -> bool:
        """Whether this differs from plain use of the snapshot."""
        return self.wait or self.fallback or self.damping_factor != 1.0


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
        try:
            object.__setattr__(self, "at_hard_bound", AtHardBound(self.at_hard_bound))
        except ValueError:
            allowed = ", ".join(repr(str(each)) for each in AtHardBound)
            raise ConfigError(f"at_hard_bound is {self.at_hard_bound!r}; allowed are {allowed}") from None

    @property
    def active(self) -> bool:
        """Whether any bound is set."""
        return self.soft_bound is not None or self.hard_bound is not None

    def check(self, *, inverse_period: int, delay: int = 1) -> None:
        """Refuses bounds that normal operation would break.

        Args:
            inverse_period: Steps between two inversions of a group.
            delay: Fewest steps between an inversion's statistics and its adoption by all ranks (announce, broadcast,
                swap).

        Raises:
            ConfigError: With the smallest legal value.
        """
        smallest = inverse_period + delay
        for name in ("soft_bound", "hard_bound"):
            bound = getattr(self, name)
            if bound is not None and bound < smallest:
                raise ConfigError(
                    f"{name} is {bound}, but staleness reaches inverse_period + delay = {inverse_period} + {delay} by "
                    f"construction; the smallest legal value is {smallest}"
                )
        if self.soft_bound is not None and self.hard_bound is not None and self.soft_bound > self.hard_bound:
            raise ConfigError(
                f"soft_bound is {self.soft_bound}, above hard_bound = {self.hard_bound}; make it the smaller one"
            )

    def decide(self, staleness: int) -> Decision:
        """Decides for a group whose snapshot is `staleness` steps old; the same on all ranks."""
        factor = 1.0
        if self.soft_bound is not None and staleness > self.soft_bound:
            factor = staleness / self.soft_bound
        if self.hard_bound is not None and staleness > self.hard_bound:
            if self.at_hard_bound is AtHardBound.WAIT:
                return Decision(damping_factor=factor, wait=True)
            if self.at_hard_bound is AtHardBound.FALLBACK:
                return Decision(damping_factor=factor, fallback=True)
        return Decision(damping_factor=factor)
