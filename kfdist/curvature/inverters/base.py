"""What every inversion method is: a configuration with one pure function."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar

from torch import Tensor

from kfdist.curvature.preconditioners import AbstractPreconditioner
from kfdist.curvature.statistics import KroneckerFactors, Statistic
from kfdist.types import BlockShape


class Outcome(StrEnum):
    """How an inversion ended, from best to worst; each has a sentence for people."""

    DONE = "done"
    FLOAT64 = "float64"
    CLAMPED = "clamped"
    MORE_DAMPING = "more_damping"
    FAILED = "failed"

    @property
    def sentence(self) -> str:
        """What it means and, where something can be done, what."""
        return _SENTENCES[self]

    @staticmethod
    def worst(*outcomes: "Outcome") -> "Outcome":
        """Returns the worst of some outcomes."""
        return max(outcomes, key=list(Outcome).index)


_SENTENCES = {
    Outcome.DONE: "The inversion succeeded as configured.",
    Outcome.FLOAT64: "The inversion wasn't accurate enough in float32 and was repeated in float64.",
    Outcome.CLAMPED: "A factor had negative eigenvalues beyond rounding; they were set to zero. A second moment has "
    "none: look for statistics that were altered after they were summed.",
    Outcome.MORE_DAMPING: "The damped factors weren't positive definite or too ill-conditioned even in float64; the "
    "damping was raised until they could be inverted. If it happens often, configure more damping.",
    Outcome.FAILED: "There is no preconditioner; the reason says why.",
}


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """One attempt to invert a block.

    Attributes:
        preconditioner: The result; None if the attempt failed.
        outcome: DONE, CLAMPED or FAILED; the ladder knows the rest.
        reason: One sentence where it failed, else empty.
        diagnostics: Numbers about the attempt. `residual_A` and `residual_G`, relative errors of what the result
            claims to be, are read by the ladder.
        state: Tensors to get back as `previous` with the next version; empty where the method keeps none.
    """

    preconditioner: AbstractPreconditioner | None
    outcome: Outcome = Outcome.DONE
    reason: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AbstractInverter(ABC):
    """Turns the reduced statistics of one block into its preconditioner. The instance is its configuration.

    Pure: no collectives, no clock, no global random state. The result depends on the arguments alone, so any owner
    computes the same answer after a restart.

    Attributes:
        name: The method's name in configurations and jobs.
        statistics: What it needs of a block.
        produces: The kind of preconditioner it makes.
    """

    name: ClassVar[str]
    statistics: ClassVar[frozenset[Statistic]]
    produces: ClassVar[type[AbstractPreconditioner]]

    @abstractmethod
    def invert(
        self, factors: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        """Inverts one block in the precision of `factors`.

        Args:
            factors: A `[c, q, q]` and G `[c, p, p]`, finite and symmetric.
            damping: lambda of F + lambda I; without effect where the preconditioner is damped at apply.
            previous: The `state` of the last version; empty at first.
            seed: The only source of randomness.

        Returns:
            The attempt; a numerical breakdown is a value, not an exception.

        Raises:
            torch.linalg.LinAlgError: LAPACK's iteration didn't converge; the ladder takes it as a breakdown.
        """

    @abstractmethod
    def cost(self, shape: BlockShape) -> float:
        """Estimates the floating-point operations of one inversion; drives the assignment."""

    def settings(self) -> dict[str, Any]:
        """Returns the configuration as JSON values by name, without the method's name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def split_seed(seed: int, label: str) -> int:
    """Derives an independent seed for one use, by a hash that never changes.

    Args:
        seed: The inversion's seed.
        label: The use, such as "A".

    Returns:
        A number in [0, 2^63).
    """
    digest = hashlib.sha256(f"kfdist/{seed}/{label}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
