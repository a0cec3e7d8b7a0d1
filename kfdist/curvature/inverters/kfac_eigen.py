"""K-FAC in the eigenbases of its factors, damped exactly at apply (algorithms.md 1.1, joint damping)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome
from kfdist.curvature.inverter_checks import check_choice
from kfdist.curvature.preconditioners import AbstractPreconditioner, KroneckerSpectrum
from kfdist.curvature.spectra import assemble, full_spectrum
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.kronecker import DampingRule
from kfdist.types import BlockShape

EIGH_FLOPS = 9.0
"""Operations of a symmetric eigendecomposition over d^3: 4/3 to tridiagonalise, the rest for the eigenvectors."""


@dataclass(frozen=True, kw_only=True)
class KfacEigen(AbstractInverter):
    """A = Q_A D_A Q_A^T, G = Q_G D_G Q_G^T; direction Q_G [(Q_G^T V Q_A) / (d_G d_A^T + lambda)] Q_A^T.

    Equals (A (x) G + lambda I)^{-1} exactly, and lambda can change without a new inversion.

    Attributes:
        damping_rule: "common" (exact, above), "pi" or "relative" (each factor damped on its own).
    """

    name: ClassVar[str] = "kfac-eigen"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerSpectrum

    damping_rule: DampingRule = "common"

    def __post_init__(self) -> None:
        check_choice("damping_rule", self.damping_rule, ("common", "pi", "relative"))

    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        """Decomposes both factors; see `AbstractInverter.invert`."""
        del damping, previous
        A = full_spectrum(statistics.A, rank=statistics.A.shape[-1], seed=seed, label="A")
        G = full_spectrum(statistics.G, rank=statistics.G.shape[-1], seed=seed, label="G")
        return Inversion(
            preconditioner=assemble(statistics, A, G, damping_rule=self.damping_rule),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    def cost(self, shape: BlockShape) -> float:
        """Estimates 9 d^3 operations a factor."""
        return EIGH_FLOPS * shape.groups * (shape.d_in**3 + shape.d_out**3)
