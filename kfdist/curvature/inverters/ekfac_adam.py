"""Adam in K-FAC's eigenbasis: bases on the owner, moments on the ranks."""

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
from kfdist.curvature.spectra import EIGH_FLOPS, full_spectra
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class AdamBasis(AbstractAdamBasis):
    r"""The eigenvectors of both factors; the ranks keep Adam's moments of the gradient's coordinates in them.

    R = Q_G^T V Q_A and U = Q_G [...] Q_A^T, with Nesterov's momentum: Adam in the basis in which EKFAC has its scales
    (George et al., arXiv 1806.03884), as SOAP is Adam in Shampoo's (Vyas et al., arXiv 2409.11321). When another basis
    comes into use v stays, eigenpairs being in order of their eigenvalues; but v is raised to m's square, without bias,
    where it is less. It never is where the two are of one coordinate, and where eigenvectors have changed places a step
    would be longer without bound.

    Attributes:
        Q_A: Eigenvectors of A in columns, `[c, q, q]`.
        Q_G: Eigenvectors of G in columns, `[c, p, p]`.
    """

    nesterov: ClassVar[bool] = True

    Q_A: Tensor
    Q_G: Tensor

    @property
    @override
    def shape(self) -> tuple[int, int, int]:
        return self.Q_A.shape[0], self.Q_G.shape[-1], self.Q_A.shape[-1]

    @override
    def coordinates(self, matrix: Float[Tensor, "c p q"]) -> Float[Tensor, "c p q"]:
        return torch.bmm(torch.bmm(self.Q_G.mT, matrix), self.Q_A)

    @override
    def matrix(self, coordinates: Float[Tensor, "c p q"], scale: float = 1.0) -> Float[Tensor, "c p q"]:
        # With beta = 0 the first argument isn't read.
        return torch.bmm(torch.baddbmm(coordinates, self.Q_G, coordinates, beta=0, alpha=scale), self.Q_A.mT)

    @override
    def second_moment(self, before: AbstractAdamBasis, memory: BlockMemory) -> Float[Tensor, "c p q"]:
        del before
        kept = memory.kept
        squared = (kept[FIRST] / never_zero(kept[FIRST_WEIGHT], kept[FIRST].dtype)).square_()
        return torch.maximum(kept[SECOND], squared.mul_(kept[SECOND_WEIGHT]))


@dataclass(frozen=True, kw_only=True)
class EkfacAdam(AbstractInverter):
    """Decomposes both factors for their eigenvectors alone; the ranks then keep Adam's moments in them.

    Attributes:
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        basis_period: Most steps between two bases, if not as many as between two inversions: rounded down to what
            divides the inverse period, by whole factor periods, of which it is at least one.
    """

    name: ClassVar[str] = "ekfac-adam"
    produces: ClassVar[type[AbstractPreconditioner]] = AdamBasis

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    basis_period: int | None = None

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), least=0, below=1)
        checks.number("eps", self.eps, above=0)
        if self.basis_period is not None:
            checks.count("basis_period", self.basis_period, least=1, hint="steps, or None")

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
        A, G = full_spectra(statistics, seed)
        return Inversion(
            preconditioner=AdamBasis(
                trace_A=trace(statistics.A),
                trace_G=trace(statistics.G),
                Q_A=A.spectrum.vectors,
                Q_G=G.spectrum.vectors,
                beta1=self.beta1,
                beta2=self.beta2,
                eps=self.eps,
            ),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts two full eigendecompositions, both bases and both moments."""
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * d for d in sizes), prepared=2 * shape.d_in * shape.d_out)
