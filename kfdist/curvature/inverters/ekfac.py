"""EKFAC: eigenbases on the owner, scales on the ranks (George et al., arXiv 1806.03884; algorithms.md 7.8)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kfdist.curvature.inverter import AbstractInverter, Inversion, Outcome
from kfdist.curvature.inverter_checks import check_count
from kfdist.curvature.inverters.kfac_eigen import EIGH_FLOPS
from kfdist.curvature.preconditioners import AbstractPreconditioner, EkfacBasis
from kfdist.curvature.spectra import full_spectrum
from kfdist.curvature.statistics import KroneckerFactors, Needs, SampleBudget
from kfdist.linalg.psd import trace
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class Ekfac(AbstractInverter):
    """Decomposes both factors for their eigenvectors alone; the ranks then measure the scales in that basis.

    Attributes:
        examples: Most examples, over all ranks, from whose gradients the scales are measured at a step.
        rows: Most rows of them, which counts where a layer is used at many positions; None: no limit.
    """

    name: ClassVar[str] = "ekfac"
    produces: ClassVar[type[AbstractPreconditioner]] = EkfacBasis

    examples: int = 256
    rows: int | None = 16384

    def __post_init__(self) -> None:
        check_count("examples", self.examples, least=1)
        if self.rows is not None:
            check_count("rows", self.rows, least=1)

    def needs(self, shape: BlockShape) -> Needs:
        """Wants the factors, and rows for the scales."""
        del shape
        return Needs(calibration=SampleBudget(examples=self.examples, rows=self.rows))

    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        """Decomposes both factors; see `AbstractInverter.invert`."""
        del damping, previous
        A = full_spectrum(statistics.A, rank=statistics.A.shape[-1], seed=seed, label="A")
        G = full_spectrum(statistics.G, rank=statistics.G.shape[-1], seed=seed, label="G")
        return Inversion(
            preconditioner=EkfacBasis(
                trace_A=trace(statistics.A),
                trace_G=trace(statistics.G),
                Q_A=A.spectrum.vectors,
                Q_G=G.spectrum.vectors,
            ),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    def cost(self, shape: BlockShape) -> float:
        """Estimates 9 d^3 operations a factor."""
        return EIGH_FLOPS * shape.groups * (shape.d_in**3 + shape.d_out**3)
