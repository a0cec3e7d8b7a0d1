"""B-KFAC, B-R-KFAC and B-KFAC-C: low-rank factors kept up by Brand's update (arXiv 2210.08494; algorithms.md 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.held_factor import HeldFactor
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerSpectrum, prepared_numbers
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.inverters.rs_kfac import RsKfac, candidate_ranks
from kfdist.curvature.spectra import EIGH_FLOPS, AdaptiveRank, enough_of, randomized_spectrum
from kfdist.curvature.statistics import Increment, Needs
from kfdist.errors import ConfigError
from kfdist.linalg.kronecker import DampingRule
from kfdist.types import BlockShape

PUBLISHED_RULE = AdaptiveRank(grow_above=0.048, shrink_below=0.013, grow=10, shrink=5, least=70, most=500)
"""The adaptive rank of Brand's updates (algorithms.md 4.4): what was cut off never comes back, so it shrinks slowly."""


@dataclass(frozen=True, kw_only=True)
class AbstractBrandKfac(AbstractInverter):
    """Follows each factor's moving average by the rows of every folding, in time and memory linear in its size.

    Brand's update takes the factors of Linear layers with rank + increment_rows < d. The others are decomposed by a
    randomised singular value decomposition every inverse period, as in `rs-kfac`, and held in between.

    Attributes:
        overwrites: Whether a decomposition of the dense average, where it comes, replaces what Brand's updates made.
        rank: Eigenpairs r of a factor that outlive an update.
        truncate: "before": the next update cuts off what is beyond the rank, so that the inverse is applied with r + n
            eigenpairs; "after": each update does so itself.
        brand_period: Steps between two updates, a multiple of the factor period that divides the inverse period; None
            for the factor period.
        increment_rows: Most rows n of one update over all ranks; more are sketched.
        adaptive_rank: Let the rank of each factor that Brand updates follow its spectrum: 10 more where w_min/w_max of
            the kept eigenvalues is above 0.048, 5 fewer where it is below 0.013, from 70 to 500. It begins at `rank`.
        oversampling: Of the randomised decomposition, as in `rs-kfac`.
        power_iterations: Of the randomised decomposition, as in `rs-kfac`.
        spectrum_continuation: Take the eigenvalues that aren't kept as equal to the smallest kept one, instead of as 0.
        damping_rule: "pi" (factored Tikhonov), "relative" (the published rule lambda_A = phi w_max(A); damping is then
            phi) or "common" (exact on products of eigenvalues).
        apply_to: "gradient", or "rows": the inverse is multiplied onto the rows of the step's batch, in O((p + q) n r)
            besides the product that forms a gradient (algorithms.md 4.3). That is the same direction only where the
            gradient is the batch's own: one process, a mean over the examples of one batch (or of micro-batches of one
            size), neither clipped nor otherwise changed before the preconditioner's step. What can be checked is.
        direction_error: Leave the eigenpairs that directions don't need out of what is applied, as in `rs-kfac`; what
            the next update goes on from has them all.
    """

    statistic: ClassVar[type] = Increment
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerSpectrum
    online: ClassVar[bool] = True
    overwrites: ClassVar[bool] = False

    rank: int = 220
    truncate: Literal["before", "after"] = "before"
    brand_period: int | None = None
    increment_rows: int = 256
    adaptive_rank: bool = False
    oversampling: int = 10
    power_iterations: int = 4
    spectrum_continuation: bool = False
    damping_rule: DampingRule = "pi"
    apply_to: Literal["gradient", "rows"] = "gradient"
    direction_error: float | None = 0.05

    def __post_init__(self) -> None:
        if self.direction_error is not None:
            checks.number("direction_error", self.direction_error, least=0, below=1, hint="0 keeps all pairs")
        for count, least in (("rank", 1), ("increment_rows", 1), ("oversampling", 0), ("power_iterations", 0)):
            checks.count(count, getattr(self, count), least=least)
        if self.brand_period is not None:
            checks.count("brand_period", self.brand_period, least=1)
        checks.choice("truncate", self.truncate, ("before", "after"))
        checks.choice("damping_rule", self.damping_rule, ("pi", "relative", "common"))
        checks.choice("apply_to", self.apply_to, ("gradient", "rows"))
        if self.apply_to == "rows" and self.damping_rule == "common":
            raise ConfigError(
                '"rows" is not allowed with damping_rule = "common", which doesn\'t split into two factors; choose '
                '"pi" or "relative"',
                path="apply_to",
            )
        for switch in ("adaptive_rank", "spectrum_continuation"):
            checks.switch(switch, getattr(self, switch))
        if self.adaptive_rank:
            PUBLISHED_RULE.check(self.rank)

    @override
    def needs(self, shape: BlockShape) -> Needs:
        """Asks for rows of the factors that Brand updates, and for dense sums of the others, or of all."""
        updated = self._updated(shape)
        sums = frozenset({"A", "G"}) if self._uses_dense else frozenset({"A", "G"}) - updated
        return Needs(
            sums=sums,
            increments=updated,
            increment_rows=self.increment_rows if updated else 0,
            applied_rows=self.apply_to == "rows" and not shape.convolution,
        )

    @override
    def note(self, shape: BlockShape) -> str:
        updated = self._updated(shape)
        if len(updated) == 1:
            (brand,) = updated
            return f"Brand on {brand}, randomised SVD on {'G' if brand == 'A' else 'A'}"
        return "Brand on A and G" if updated else "randomised SVD on A and G"

    @property
    @override
    def own_period(self) -> int | None:
        return self.brand_period

    @override
    def update_period(self, factor_period: int, inverse_period: int) -> int:
        period = factor_period if self.brand_period is None else self.brand_period
        if period % factor_period or inverse_period % period:
            raise ConfigError(
                f"{period} is not allowed; must be a multiple of the factor period ({factor_period}) that divides the "
                f"inverse period ({inverse_period})",
                path="brand_period",
            )
        return period

    @override
    def invert(self, statistics: Increment, *, damping: float, previous: Mapping[str, Tensor], seed: int) -> Inversion:
        factors: dict[str, HeldFactor] = {}
        outcomes, diagnostics = [Outcome.DONE], {}
        for label, rows, dense in (
            ("A", statistics.A_rows, statistics.A),
            ("G", statistics.G_rows, statistics.G),
        ):
            held = HeldFactor.from_state(previous, label, rows, rank=None if self.adaptive_rank else self.rank)
            if rows.shape[-2]:
                if held is None or held.weight is None:
                    held = HeldFactor.empty(rows, self.rank)
                factor, outcome, found = self._followed(held, rows, dense, statistics, label, seed)
            elif dense.numel():
                factor, outcome, found = self._decomposed(dense, None, self.rank, label, seed)
            elif held is not None:
                factor, outcome, found = held, Outcome.DONE, {}
            else:
                return Inversion.failed(f"factor {label} was not measured yet; it comes with the next inverse period")
            if not factor.measured:
                return Inversion.failed(f"factor {label} holds no examples: every batch so far was dropped or absent")
            factors[label] = factor
            outcomes.append(outcome)
            diagnostics |= factor.diagnostics(label, found, seed=seed)
        A, G = factors["A"], factors["G"]
        preconditioner, kept = enough_of(
            A.spectrum(continued=self.spectrum_continuation),
            G.spectrum(continued=self.spectrum_continuation),
            traces=(A.mean_trace(), G.mean_trace()),
            damping_rule=self.damping_rule,
            damping=damping,
            direction_error=self.direction_error,
            missing=(A.mean_missing(), G.mean_missing()),
        )
        return Inversion(
            preconditioner=preconditioner,
            outcome=Outcome.worst(*outcomes),
            diagnostics=diagnostics | kept,
            state=A.to_state("A") | G.to_state("G"),
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts the costliest job, and each factor's eigenpairs twice: for use, and for the next job to go on from."""
        updated, work, numbers, pairs = self._updated(shape), [], 0, []
        for label, d in (("A", shape.d_in), ("G", shape.d_out)):
            work += self._update_work(d) if label in updated else [self._decomposition_work(d)]
            columns = self.rank + self.increment_rows if label in updated else min(self.rank, d)
            numbers += 2 * d * columns
            pairs.append((d, min(columns, d)))
        return Estimate(work, numbers, prepared_numbers(*pairs, damping_rule=self.damping_rule))

    @classmethod
    @override
    def candidates(cls, shape: BlockShape) -> Sequence[Self]:
        return [cls(rank=rank) for rank in candidate_ranks(shape)]

    @property
    def correction(self) -> float:
        """Share of a factor's eigenpairs that are refreshed from its dense average, where it comes; 0 for none."""
        return 0.0

    @property
    def _uses_dense(self) -> bool:
        """Whether factors that Brand updates are averaged densely too."""
        return self.overwrites or self.correction > 0

    def _updated(self, shape: BlockShape) -> frozenset[str]:
        """Returns the factors that Brand updates."""
        if shape.convolution:
            return frozenset()
        room = (PUBLISHED_RULE.most if self.adaptive_rank else self.rank) + self.increment_rows
        return frozenset(label for label, d in (("A", shape.d_in), ("G", shape.d_out)) if room < d)

    def _followed(
        self, held: HeldFactor, rows: Tensor, dense: Tensor, statistics: Increment, label: str, seed: int
    ) -> tuple[HeldFactor, Outcome, dict[str, float]]:
        """Brings a factor that Brand updates up to this folding."""
        counted = statistics.examples if label == "A" else statistics.positions
        factor, outcome, found = held.decayed(statistics.decay, counted), Outcome.DONE, {}
        dense_is_due = dense.numel() > 0 and factor.measured
        if dense_is_due and self.overwrites:
            factor, outcome, found = self._decomposed(dense, factor.weight, factor.rank, label, seed)
        elif float(counted) > 0.0:
            factor, found = factor.updated(rows, seed=seed, label=label)
        if self.truncate == "after":
            factor = factor.truncated()
        if dense_is_due and self.correction > 0:
            factor = factor.corrected(dense, fraction=self.correction, seed=seed, label=label)
            found |= factor.approximation_error(dense, seed=seed, label=label)
        if self.adaptive_rank:
            factor = factor.adapted(PUBLISHED_RULE, most=rows.shape[-1] - rows.shape[-2])
        return factor, outcome, found

    def _decomposed(
        self, dense: Tensor, weight: Tensor | None, rank: int, label: str, seed: int
    ) -> tuple[HeldFactor, Outcome, dict[str, float]]:
        found = randomized_spectrum(
            dense,
            rank=rank,
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            method="rsvd",
            seed=seed,
            label=label,
        )
        factor = HeldFactor.of_dense(found, dense, weight=weight, rank=rank)
        return factor, found.outcome, found.diagnostics

    def _update_work(self, d: int) -> list[Work]:
        """Counts Brand's update with what the dense factor adds, or the decomposition that takes its place."""
        k = self.rank + self.increment_rows
        update, decomposition = Work(Operation.BRAND, brand_flops(d, k)), self._decomposition_work(d)
        if self.overwrites and decomposition.flops > update.flops:
            return [decomposition]
        return [update, Work(Operation.PRODUCTS, 2.0 * d * d * self.correction * k)]

    def _decomposition_work(self, d: int) -> Work:
        sketched = RsKfac(rank=self.rank, oversampling=self.oversampling, power_iterations=self.power_iterations)
        return sketched.factor_work(d)


@dataclass(frozen=True, kw_only=True)
class BKfac(AbstractBrandKfac):
    """Brand's updates alone: no dense average exists of the factors that they take."""

    name: ClassVar[str] = "b-kfac"


@dataclass(frozen=True, kw_only=True)
class BRKfac(AbstractBrandKfac):
    """Brand's updates, overwritten every inverse period by a randomised decomposition of the dense average."""

    name: ClassVar[str] = "b-r-kfac"
    overwrites: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class BKfacC(AbstractBrandKfac):
    """Brand's updates, corrected every inverse period from the dense average, at random eigenpairs.

    Attributes:
        correction_fraction: phi: of k eigenpairs, round(phi k + 1) are refreshed; 0 for none: that is `b-kfac`.
    """

    name: ClassVar[str] = "b-kfac-c"

    correction_fraction: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number("correction_fraction", self.correction_fraction, least=0, most=1)

    @property
    @override
    def correction(self) -> float:
        return self.correction_fraction


def brand_flops(d: int, columns: int) -> float:
    """Counts the operations of Brand's update of a d x d factor.

    Projections and their repetition, QR and the new basis take about 6 d k^2 for k columns, old and new; the small
    matrix is decomposed in full.
    """
    return 6.0 * d * columns**2 + EIGH_FLOPS * columns**3
