"""Two-level K-FAC: a coarse correction over all blocks beside another method (arXiv 2011.00573; algorithms.md 7.1).

R sums all entries of a block's gradient, so that F_c = R F R^T, one row per block, holds what the blocks' sums have to
do with each other: F_c[i, j] = sum(A_ij) sum(G_ij). The paper adds omega_2 R^T (F_c + lambda I)^{-1} R to the inverse
of the block-diagonal matrix B. Then a large lambda leaves (I + R^T R) V / lambda, where every other method leaves
V / lambda: the coarse part does again what B^{-1} has done already. The default here adds only what the coupling
changes,

    R^T [(D + off-diagonal part of F_c)^{-1} - D^{-1}] R    with D = R B R^T, which is diagonal.

B^{-1} - R^T D^{-1} R is positive semi-definite for every positive definite B (it is B^{-1/2} (I - P) B^{-1/2} with the
orthogonal projector P onto the columns of B^{1/2} R^T), so the whole operator is positive definite. The difference goes
down as 1/lambda^2, and it vanishes for a single block or without correlation between blocks. See
docs/decisions/0009-two-level-adds-the-difference.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.coupled import CoupledPreconditioner
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerSpectrum
from kfdist.curvature.inverter import AbstractInverter, Coupling, Estimate, Inversion, Placement
from kfdist.curvature.statistics import CoarseFactors, KroneckerFactors, Needs
from kfdist.errors import ConfigError
from kfdist.linalg.kronecker import Spectrum
from kfdist.linalg.psd import symmetrise
from kfdist.types import BlockName, BlockShape

Combination = Literal["difference", "additive"]


@dataclass(frozen=True, kw_only=True)
class TwoLevelBlock(CoupledPreconditioner):
    """omega_fine B^{-1} V + omega_coarse R^T C R V, damped at apply; see `kfdist.curvature.inverters.two_level`.

    B is the block-diagonal matrix of the inner method, damped. R V sums each block's gradient to one number, and R^T
    gives that number's share back to every weight. D = R B R^T is diagonal, F_c = R F R^T isn't, and

        "difference":  C = (D + off-diagonal part of F_c)^{-1} - D^{-1}
        "additive":    C = (F_c + lambda I)^{-1}, as published.

    Attributes:
        inner: The inner method's inverse of this block.
        coarse_row: The block's row of F_c, `[L]`.
        sum_A: Sum of all entries of A as `inner` holds it, `[c]`.
        sum_G: Likewise of G, `[c]`.
        omega_fine: Weight of the inner method's direction.
        omega_coarse: Weight of the coarse correction.
        combination: "difference" or "additive".
    """

    damping_at_apply: ClassVar[bool] = True

    inner: KroneckerSpectrum
    coarse_row: Tensor
    sum_A: Tensor
    sum_G: Tensor
    omega_fine: float
    omega_coarse: float
    combination: Combination

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.inner.shape

    @override
    def serves(self, damping: float) -> bool:
        return self.inner.serves(damping)

    @override
    def joint_damping(self, damping: float) -> Float[Tensor, " c"]:
        return self.inner.joint_damping(damping)

    def coarse_block(self, damping: float) -> Float[Tensor, ""]:
        """Returns 1^T B 1, the sum of all entries of this block of the inner method's damped matrix."""
        _, p, q = self.shape
        if self.inner.damping_rule == "common":
            return (self.sum_A * self.sum_G + damping * p * q).sum()
        damping_A, damping_G = self.inner.factor_damping(damping)
        return ((self.sum_A + damping_A * q) * (self.sum_G + damping_G * p)).sum()

    @classmethod
    @override
    def _solve_group(  # pyright: ignore[reportIncompatibleMethodOverride]  # see CoupledPreconditioner.apply_group
        cls, members: Sequence[Self], gradients: Sequence[Tensor], damping: float, memories: Sequence[BlockMemory]
    ) -> list[Tensor]:
        each = list(zip(members, gradients, memories, strict=True))
        first = members[0]
        fine = [member.inner.apply(V, damping, memory) for member, V, memory in each]
        if first.omega_fine != 1:
            fine = [direction.mul_(first.omega_fine) for direction in fine]
        if first.omega_coarse == 0:
            return fine
        rows = torch.stack([member.coarse_row for member in members])
        sums = torch.stack([V.sum() for V in gradients]).double()
        if first.combination == "additive":
            coarse = _solve(rows, rows.diagonal().double() + damping, sums)
        else:
            own = torch.stack([member.coarse_block(damping) for member in members]).double()
            coarse = _solve(rows, own, sums) - sums / own
        correction = (first.omega_coarse * coarse).to(fine[0].dtype)
        return [direction.add_(share) for direction, share in zip(fine, correction, strict=True)]


def _solve(rows: Tensor, diagonal: Tensor, right_side: Tensor) -> Tensor:
    """Solves an L x L system in float64, without a host sync.

    Blocks differ by orders of magnitude, so it is scaled to a unit diagonal. Entries off the diagonal are reduced by
    the rounding that they went through: a matrix that is positive definite but for rounding stays so.

    Args:
        rows: Gives the entries off the diagonal, `[L, L]`.
        diagonal: Positive, `[L]`, float64.
        right_side: `[L]`, float64.
    """
    scale = diagonal.rsqrt()
    kept = 1 - 4 * len(rows) * torch.finfo(rows.dtype).eps
    matrix = kept * rows.double() * scale * scale.unsqueeze(-1)
    matrix.diagonal().fill_(1.0)
    factor, _ = torch.linalg.cholesky_ex(matrix)
    return scale * torch.cholesky_solve((scale * right_side).unsqueeze(-1), factor).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class TwoLevel(AbstractInverter):
    """Another method's inverse of each block, corrected by one number per block that depends on all of them.

    F_c is positive semi-definite where both of its factors are second moments, by Schur's product theorem. Where maps
    of different sizes are compared at some of their positions they aren't; then negative eigenvalues of the
    correlations F_c[i, j]/sqrt(F_c[i, i] F_c[j, j]) are set to zero and the diagonal restored to 1.
    `smallest_eigenvalue_coarse` says what they were.

    Attributes:
        inner: The method of the blocks, one that keeps eigenpairs; `kfac` is "kfac-eigen" with damping_rule "pi".
        inner_settings: Its settings; the rest keep their defaults.
        omega_fine: Weight of the inner method's direction. Other values than 1 scale the whole step.
        omega_coarse: Weight of the coarse correction, from 0; at most `omega_fine` for "difference".
        combination: "difference" (the coupling's effect alone) or "additive" (as published: lambda times the direction
            doesn't tend to the gradient as lambda grows).
    """

    name: ClassVar[str] = "two-level"
    statistic: ClassVar[type] = CoarseFactors
    produces: ClassVar[type[AbstractPreconditioner]] = TwoLevelBlock
    coupling: ClassVar[Coupling] = Coupling.COARSE

    inner: str = "kfac-eigen"
    inner_settings: Mapping[str, Any] = field(default_factory=dict)
    omega_fine: float = 1.0
    omega_coarse: float = 1.0
    combination: Combination = "difference"

    def __post_init__(self) -> None:
        checks.choice("combination", self.combination, get_args(Combination))
        checks.number("omega_fine", self.omega_fine, least=0)
        checks.number("omega_coarse", self.omega_coarse, least=0)
        if self.omega_fine == 0:
            raise ConfigError("0 is not allowed; most of the direction is the inner method's", path="omega_fine")
        if self.combination == "difference" and self.omega_coarse > self.omega_fine:
            raise ConfigError(
                f"{self.omega_coarse} is more than omega_fine = {self.omega_fine}: the operator might not be positive "
                'definite; lower it, or set combination = "additive"',
                path="omega_coarse",
            )
        self._check_inner(self._inner())

    @override
    def needs(self, shape: BlockShape) -> Needs:
        inner = self._inner().needs(shape)
        return replace(inner, sums=inner.sums | {"a_cross", "g_cross"})

    @override
    def refusal(self, shapes: Mapping[BlockName, BlockShape]) -> str:
        """Refuses grouped convolutions."""
        for name, shape in shapes.items():
            if shape.groups > 1:
                # The sum over all of F's entries is then a sum of products, one per group, not a product of sums.
                return f"two-level has no cross factors for the grouped convolution {name!r}; give it {self.inner!r}"
        return self._inner().refusal(shapes)

    @override
    def note(self, shape: BlockShape) -> str:
        return "; ".join(part for part in (f"around {self.inner}", self._inner().note(shape)) if part)

    @property
    @override
    def own_period(self) -> int | None:
        return self._inner().own_period

    @override
    def update_period(self, factor_period: int, inverse_period: int) -> int:
        return self._inner().update_period(factor_period, inverse_period)

    @override
    def invert(
        self, statistics: CoarseFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        group = self.invert_group({"": statistics}, damping=damping, previous={"": previous}, seeds={"": seed})
        return group[""]

    @override
    def invert_group(
        self,
        statistics: Mapping[BlockName, CoarseFactors],
        *,
        damping: float,
        previous: Mapping[BlockName, Mapping[str, Tensor]],
        seeds: Mapping[BlockName, int],
    ) -> dict[BlockName, Inversion]:
        """Inverts each block by the inner method and adds the coarse matrix.

        Raises:
            ValueError: A block's cross sums are not one per block of the group.
        """
        fine = self._inner().invert_group(statistics, damping=damping, previous=previous, seeds=seeds)
        spectra = {n: f.preconditioner for n, f in fine.items() if isinstance(f.preconditioner, KroneckerSpectrum)}
        if len(spectra) < len(fine):
            failed = Inversion.failed("another block of the group failed")
            return {name: failed if name in spectra else found for name, found in fine.items()}
        sums = {name: inner_sums(spectrum) for name, spectrum in spectra.items()}
        correlations, sizes, smallest = _correlations(list(statistics.values()))
        if self.combination == "difference":
            sizes = torch.stack([(a * g).sum() for a, g in sums.values()]).double().sqrt()
        coarse = correlations * sizes * sizes.unsqueeze(-1)
        inversions: dict[BlockName, Inversion] = {}
        for place, (name, spectrum) in enumerate(spectra.items()):
            block = TwoLevelBlock(
                trace_A=spectrum.trace_A,
                trace_G=spectrum.trace_G,
                place=place,
                members=len(spectra),
                inner=spectrum,
                coarse_row=coarse[place].to(spectrum.trace_A.dtype),
                sum_A=sums[name][0],
                sum_G=sums[name][1],
                omega_fine=self.omega_fine,
                omega_coarse=self.omega_coarse,
                combination=self.combination,
            )
            diagnostics = {**fine[name].diagnostics, "smallest_eigenvalue_coarse": smallest}
            inversions[name] = replace(fine[name], preconditioner=block, diagnostics=diagnostics)
        return inversions

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Returns the inner method's: the coarse matrix is as small as there are blocks."""
        return self._inner().estimate(shape)

    @override
    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "inner_settings": dict(self.inner_settings)}

    def _inner(self) -> AbstractInverter:
        from kfdist.curvature.inverters import make_inverter  # the table there lists this class too

        if not isinstance(self.inner_settings, Mapping):
            raise ConfigError(f"{self.inner_settings!r} must be a table of settings", path="inner_settings")
        try:
            return make_inverter(self.inner, **self.inner_settings)
        except ConfigError as error:
            where = {"method": "inner", "settings": "inner_settings"}.get(error.path, f"inner_settings.{error.path}")
            raise error.at(where) from error

    def _check_inner(self, inner: AbstractInverter) -> None:
        plain = inner.statistic is KroneckerFactors and inner.produces is KroneckerSpectrum
        if not plain or inner.online or inner.placement is not Placement.OWNER or inner.coupling is not Coupling.NONE:
            raise ConfigError(
                f"{self.inner!r} is not allowed; must be a method that keeps eigenpairs of both factors, such as "
                "'kfac-eigen' (with damping_rule 'pi' it is kfac) or 'rs-kfac'",
                path="inner",
            )
        if getattr(inner, "damping_rule", None) == "relative":
            raise ConfigError(
                "'relative' is not allowed here: its damping is a fraction, the coarse matrix needs lambda; choose "
                "'common' or 'pi'",
                path="inner_settings.damping_rule",
            )


def inner_sums(spectrum: KroneckerSpectrum) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """Returns the sums of all entries of both factors as the spectrum holds them: 1^T A 1 and 1^T G 1."""
    return _sum_of(spectrum.A), _sum_of(spectrum.G)


def _sum_of(factor: Spectrum) -> Tensor:
    along = factor.vectors.sum(-2).square()
    return (factor.values * along).sum(-1) + factor.tail * (factor.vectors.shape[-2] - along.sum(-1)).clamp_min(0)


def _correlations(statistics: Sequence[CoarseFactors]) -> tuple[Tensor, Tensor, float]:
    """Splits F_c into sizes and correlations, F_c[i, j] = size_i size_j correlation_ij, in float64.

    Returns:
        Correlations `[L, L]`, positive semi-definite with unit diagonal; sizes `[L]`; the smallest eigenvalue that the
        correlations had. A block whose sum is zero has no correlation with the others.
    """
    count = len(statistics)
    for each in statistics:
        if each.a_cross.shape != (count,) or each.g_cross.shape != (count,):
            raise ValueError(
                f"cross sums have shapes {tuple(each.a_cross.shape)} and {tuple(each.g_cross.shape)}, must be "
                f"({count},), one per block of the group"
            )
    sums_A = torch.stack([each.a_cross for each in statistics]).double()
    F_c = symmetrise(sums_A * torch.stack([each.g_cross for each in statistics]).double())
    sizes = F_c.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(sizes > 0, 1 / sizes, torch.zeros_like(sizes))
    found = (F_c * inverse * inverse.unsqueeze(-1)).clamp(-1, 1)
    found.diagonal().fill_(1.0)
    values, vectors = torch.linalg.eigh(found)
    smallest = values.min().item()
    if smallest < 0:
        found = symmetrise((vectors * values.clamp_min(0)) @ vectors.mT)
        scale = found.diagonal().rsqrt()
        found = found * scale * scale.unsqueeze(-1)
    return found, sizes, smallest
