"""What every inversion method is: a configuration with one pure function."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.statistics import KroneckerFactors, Needs
from kfdist.types import BlockName, BlockShape


class Outcome(StrEnum):
    """How an inversion ended, from best to worst; each has a message for users."""

    DONE = "done"
    FLOAT64 = "float64"
    CLAMPED = "clamped"
    MORE_DAMPING = "more_damping"
    FAILED = "failed"

    @property
    def message(self) -> str:
        """What it means and, where something can be done, what."""
        return _MESSAGES[self]

    @staticmethod
    def worst(*outcomes: "Outcome") -> "Outcome":
        """Returns the worst of some outcomes."""
        return max(outcomes, key=list(Outcome).index)


_MESSAGES = {
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
    """How the inversion of one block went: one attempt of a method, or what the ladder made of several.

    Attributes:
        preconditioner: The result; None if it failed.
        outcome: Of a method DONE, CLAMPED or FAILED; the rest says which rung of the ladder held.
        reason: Why it failed; from the ladder, what went wrong on the way, empty if nothing did.
        diagnostics: By name with the factor's letter: `residual_*`, relative errors of what the result claims to be, by
            which the ladder judges; `orthogonality_*`, ||U^T U - I|| of eigenvectors, Frobenius;
            `smallest_eigenvalue_*`; `rank_*`. The ladder leaves out what isn't finite and adds the `rung`, from 0, and
            the `damping` that it used.
        state: Tensors to get back as `previous` with the next version; empty where the method keeps none.
    """

    preconditioner: AbstractPreconditioner | None
    outcome: Outcome = Outcome.DONE
    reason: str = ""
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def failed(cls, reason: str, state: Mapping[str, Tensor] | None = None) -> Self:
        """Makes the failure of a block; with `state`, what its next inversion gets back."""
        return cls(preconditioner=None, outcome=Outcome.FAILED, reason=reason, state=state or {})


class Placement(StrEnum):
    """Who inverts."""

    OWNER = "owner"
    """Whoever the link reaches, off the training path; the result is adopted later."""
    WORKER = "worker"
    """Every rank for itself, at once: the work is as small as handling a result would be."""


class Coupling(StrEnum):
    """What a method measures between the blocks of a group."""

    NONE = "none"
    """Nothing: each block is its own group."""
    CHAIN = "chain"
    """Cross factors of each block with the next (`ChainFactors`)."""
    COARSE = "coarse"
    """Sums of the cross factors of all pairs (`CoarseFactors`)."""


class Operation(StrEnum):
    """A kind of work in an inversion; each runs at its own speed, which `kfdist.curvature.auto` measures."""

    CHOLESKY = "cholesky"
    """Cholesky factorisation of a damped factor, and inversion by it: d^3 operations."""
    EIGH = "eigh"
    """Eigendecomposition of a symmetric matrix: `EIGH_FLOPS` d^3."""
    SKETCH = "sketch"
    """Randomised decomposition; see `AbstractSketchedKfac.factor_work`."""
    BRAND = "brand"
    """Brand's update; see `brand_flops`."""
    PRODUCTS = "products"
    """Matrix products and what costs less; never what decides whether an inversion is affordable."""


class Work(NamedTuple):
    """One operation of an inversion and how many floating-point operations it takes."""

    operation: Operation
    flops: float


class Estimate(NamedTuple):
    """What one group of a block takes.

    Attributes:
        work: The operations of one inversion.
        numbers: Most numbers in the result and its state.
        prepared: Most numbers that a rank works out of the result for its damping, and keeps while it is in use.
        workspace: Most numbers at once beside the statistics and the result, where they are more than another result.
    """

    work: Sequence[Work]
    numbers: int
    prepared: int = 0
    workspace: int = 0


@dataclass(frozen=True, kw_only=True)
class AbstractInverter(ABC):
    """Turns the reduced statistics of a block, or a group of them, into preconditioners. The instance is its settings.

    Pure: no collectives, no clock, no global random state. The result depends on the arguments alone, so any owner
    computes the same answer after a restart.

    Attributes:
        name: The method's name in configurations and jobs.
        statistic: The record it is given of a block.
        produces: The kind of preconditioner it makes.
        placement: Who inverts.
        coupling: Whether its blocks form one group, and what is measured between them.
        online: Whether each result is a step of one computation: every increment is applied once and in order, on the
            state of the one before.
        patient: Whether a block without statistics waits for its next folding, instead of being due at every step until
            it has some: so for blocks whose parameters may be used in ways that can't be measured.
    """

    name: ClassVar[str]
    statistic: ClassVar[type] = KroneckerFactors
    produces: ClassVar[type[AbstractPreconditioner]]
    placement: ClassVar[Placement] = Placement.OWNER
    coupling: ClassVar[Coupling] = Coupling.NONE
    online: ClassVar[bool] = False
    patient: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        produces = getattr(cls, "produces", None)  # an abstract family may leave it open
        if cls.placement is Placement.WORKER and produces is not None and not produces.damping_at_apply:
            raise TypeError(
                f"{cls.__name__} is placed on the workers, where no damping reaches an inversion, but "
                f"{produces.__name__} isn't damped at apply; use Placement.OWNER, or damp at apply"
            )

    def needs(self, shape: BlockShape) -> Needs:
        """Says what it wants measured of a block of this shape."""
        del shape
        return Needs()

    def refusal(self, shapes: Mapping[BlockName, BlockShape]) -> str:
        """Says why it can't invert these blocks of one group, in the model's order; empty if it can."""
        del shapes
        return ""

    def model_refusal(self, model: nn.Module, names: Sequence[BlockName]) -> str:
        """Says the same of a model without wrappers such as DistributedDataParallel, as `refusal` does of shapes."""
        del model, names
        return ""

    def note(self, shape: BlockShape) -> str:
        """Says in a few words what it will do with a block of this shape, for `coverage()`; mostly nothing."""
        del shape
        return ""

    @property
    def own_period(self) -> int | None:
        """The steps between two jobs where the settings say them; see `update_period`."""
        return None

    def update_period(self, factor_period: int, inverse_period: int) -> int:
        """Returns the steps between two jobs of a block.

        Args:
            factor_period: Steps between two foldings.
            inverse_period: Steps between two inversions, its multiple.

        Raises:
            ConfigError: The method's own period doesn't fit between the two.
        """
        del factor_period
        return inverse_period

    @abstractmethod
    def invert(self, statistics: Any, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        """Inverts one block in the precision of its statistics.

        Args:
            statistics: A `statistic`; checked as `kfdist.curvature.ladder` says.
            damping: lambda of F + lambda I; without effect where the preconditioner is damped at apply.
            previous: The `state` of the last version; empty at first.
            seed: The only source of randomness.

        Returns:
            The attempt; a numerical breakdown is a value, not an exception.

        Raises:
            torch.linalg.LinAlgError: LAPACK's iteration didn't converge; the ladder takes it as a breakdown.
        """

    def invert_group(
        self,
        statistics: Mapping[BlockName, Any],
        *,
        damping: float,
        previous: Mapping[BlockName, Mapping[str, Tensor]],
        seeds: Mapping[BlockName, int],
    ) -> dict[BlockName, Inversion]:
        """Inverts a group of blocks, in the model's order; methods that couple blocks override it."""
        return {
            name: self.invert(each, damping=damping, previous=previous.get(name, {}), seed=seeds[name])
            for name, each in statistics.items()
        }

    @abstractmethod
    def estimate(self, shape: BlockShape) -> Estimate:
        """Estimates what one group of a block of this shape takes."""

    def cost(self, shape: BlockShape) -> float:
        """Estimates the floating-point operations of one inversion; drives the assignment."""
        return shape.groups * sum(work.flops for work in self.estimate(shape).work)

    @classmethod
    def candidates(cls, shape: BlockShape) -> Sequence[Self]:
        """Lists what "auto" may try on a block of this shape, from the most faithful to the cheapest."""
        del shape
        return [cls()]

    def settings(self) -> dict[str, Any]:
        """Returns the configuration as JSON values by name, without the method's name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
