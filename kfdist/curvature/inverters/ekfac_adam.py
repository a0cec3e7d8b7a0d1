"""Adam in K-FAC's eigenbasis: bases on the owner, moments on the ranks (docs/decisions/0034 has the narrow ones)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.adam_moments import FIRST, FIRST_WEIGHT, SECOND, SECOND_WEIGHT, AbstractAdamBasis, never_zero
from kfdist.curvature.block_memory import BlockMemory
from kfdist.curvature.inverse import AbstractPreconditioner
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Outcome, Work
from kfdist.curvature.inverters.rs_kfac import SreKfac
from kfdist.curvature.spectra import EIGH_FLOPS, FactorSpectrum, full_spectrum, randomized_spectrum
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.orthonormal_basis import OrthonormalBasis
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape

_NONE = torch.empty(0, 0, 0, dtype=torch.float32, device="cpu")
"""No reflections: what payloads of before there were any lack."""


@dataclass(frozen=True, kw_only=True)
class AdamBasis(AbstractAdamBasis):
    r"""The eigenvectors of both factors; the ranks keep Adam's moments of the gradient's coordinates in them.

    R = Q_G^T V Q_A and U = Q_G [...] Q_A^T, with Nesterov's momentum: Adam in the basis in which EKFAC has its scales
    (George et al., arXiv 1806.03884), as SOAP is Adam in Shampoo's (Vyas et al., arXiv 2409.11321). When another basis
    comes into use v stays, eigenpairs being in order of their eigenvalues; but v is raised to m's square, without bias,
    where it is less. It never is where the two are of one coordinate, and where eigenvectors have changed places a step
    would be longer without bound.

    Of a wide factor Q has the leading eigenvectors, and then directions near to the axes, in the axes' order: there it
    is Adam in the parameters' own coordinates, but for what the eigenvectors have taken from them.

    Attributes:
        Q_A: Eigenvectors of A in columns, `[c, q, q]`; or W of I - W Y^T, whose first r columns they are, up to signs.
        Q_G: Those of G, `[c, p, p]`; or W.
        Y_A: Y, `[c, q, r]`; no numbers where all eigenvectors are kept.
        Y_G: Likewise, `[c, p, r]`.
    """

    nesterov: ClassVar[bool] = True

    Q_A: Tensor
    Q_G: Tensor
    Y_A: Tensor = _NONE
    Y_G: Tensor = _NONE

    @property
    def A(self) -> OrthonormalBasis:
        """The basis of A."""
        return OrthonormalBasis(self.Q_A, self.Y_A)

    @property
    def G(self) -> OrthonormalBasis:
        """The basis of G."""
        return OrthonormalBasis(self.Q_G, self.Y_G)

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.Q_A.shape[0], self.Q_G.shape[-2], self.Q_A.shape[-2]

    @override
    def coordinates(self, matrix: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        return self.A.rotated(self.G.columns_rotated(matrix))

    @override
    def matrix(self, coordinates: Float[Tensor, "c p q"], scale: float = 1.0) -> Float[Tensor, "c p q"]:
        return self.A.rotated_back(self.G.columns_rotated_back(coordinates, scale))

    @override
    def turn(self, matrix: Float[Tensor, "c p q"]) -> None:
        self.A.rotated(self.G.columns_rotated(matrix), out=matrix)

    @override
    def turn_back(self, coordinates: Float[Tensor, "c p q"], scale: float) -> None:
        self.A.rotated_back(self.G.columns_rotated_back(coordinates, scale), out=coordinates)

    @override
    def second_moment(self, before: AbstractAdamBasis, memory: BlockMemory) -> Float[Tensor, "c p q"]:
        del before
        kept = memory.kept
        squared = (kept[FIRST] / never_zero(kept[FIRST_WEIGHT], kept[FIRST].dtype)).square_()
        return torch.maximum(kept[SECOND], squared.mul_(kept[SECOND_WEIGHT]))


@dataclass(frozen=True, kw_only=True)
class EkfacAdam(AbstractInverter):
    """Decomposes both factors for their eigenvectors alone; the ranks then keep Adam's moments in them.

    A factor more than four times as wide as `rank` has a basis that begins with the leading eigenvectors, found with a
    Gaussian sketch as `sre-kfac` finds them; of a factor of fewer rows, as at the first step, there are only as many.
    The rest of it is near to the axes. A step multiplies by it in less than half of the operations of a full basis.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        basis_period: Most steps between two bases, if not as many as between two inversions: rounded down to what
            divides the inverse period, by whole factor periods, of which it is at least one.
        rank: Leading eigenvectors of a factor more than four times as wide; None: all of every factor.
    """

    name: ClassVar[str] = "ekfac-adam"
    produces: ClassVar[type[AbstractPreconditioner]] = AdamBasis

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    basis_period: int | None = None
    rank: int | None = 128

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("eps", self.eps, above=0)
        if self.basis_period is not None:
            checks.count("basis_period", self.basis_period, least=1, hint="steps, or None")
        if self.rank is not None:
            checks.count("rank", self.rank, least=1, hint="eigenvectors, or None for all")

    @override
    def update_period(self, factor_period: int, inverse_period: int) -> int:
        if self.basis_period is None:
            return inverse_period
        most = max(factor_period, min(self.basis_period, inverse_period))
        return max(each for each in range(factor_period, most + 1, factor_period) if inverse_period % each == 0)

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        (basis_A, A), (basis_G, G) = (
            self._basis(matrix, label, seed) for label, matrix in (("A", statistics.A), ("G", statistics.G))
        )
        return Inversion(
            preconditioner=AdamBasis(
                trace_A=trace(statistics.A),
                trace_G=trace(statistics.G),
                Q_A=basis_A.W,
                Q_G=basis_G.W,
                Y_A=basis_A.Y,
                Y_G=basis_G.Y,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
            ),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts both decompositions, both bases and both moments."""
        sizes = shape.d_in, shape.d_out
        sketched = None if self.rank is None else _sketched(self.rank)
        work, numbers, workspace = [], 0, 0
        for d in sizes:
            if sketched is None or not self._is_wide(d):
                work.append(Work(Operation.EIGH, EIGH_FLOPS * d**3))
                numbers += d * d
            else:
                work.append(sketched.factor_work(d))
                numbers += 2 * d * sketched.rank
                workspace = max(workspace, sketched.workspace(d))
        return Estimate(work, numbers, prepared=2 * shape.d_in * shape.d_out, workspace=workspace)

    def _is_wide(self, d: int) -> bool:
        """Says whether a basis of reflections multiplies a row in less than half of the operations, 4 r d for 2 d^2."""
        return self.rank is not None and 4 * self.rank < d

    def _basis(self, matrix: Float[Tensor, "c d d"], label: str, seed: int) -> tuple[OrthonormalBasis, FactorSpectrum]:
        d = matrix.shape[-1]
        if self.rank is None or not self._is_wide(d):
            found = full_spectrum(matrix, rank=d, seed=seed, label=label)
            return OrthonormalBasis.whole(found.spectrum.vectors), found
        sketched = _sketched(self.rank)
        found = randomized_spectrum(
            matrix,
            rank=sketched.rank,
            oversampling=sketched.oversampling,
            power_iterations=sketched.power_iterations,
            method=sketched.decomposition,
            seed=seed,
            label=label,
        )
        return OrthonormalBasis.completing(found.spectrum.vectors), found


def _sketched(rank: int) -> SreKfac:
    """Returns who knows what the decompositions of wide factors cost.

    One power iteration: any basis is orthonormal, and as good directions as those need no more.
    """
    return SreKfac(rank=rank, power_iterations=1)
