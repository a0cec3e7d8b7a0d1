"""RS-KFAC: K-FAC with randomised low-rank factors (Puiu, arXiv 2206.15397; algorithms.md 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from kfdist.curvature.inverters.base import AbstractInverter, Inversion, Outcome
from kfdist.curvature.inverters.checks import check_choice, check_count
from kfdist.curvature.inverters.kfac_eigen import EIGH_FLOPS
from kfdist.curvature.inverters.spectra import FactorSpectrum, assemble, randomized_spectrum
from kfdist.curvature.preconditioners import AbstractPreconditioner, KroneckerSpectrum
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.errors import ConfigError
from kfdist.linalg.kronecker import DampingRule
from kfdist.types import BlockShape


@dataclass(frozen=True, kw_only=True)
class RsKfac(AbstractInverter):
    """Keeps the leading eigenpairs of each factor, found with a Gaussian sketch; applies their inverse in O(r p q).

    Attributes:
        rank: Eigenpairs r kept of each factor, clamped to its size.
        oversampling: Further columns l of the sketch; where r + l reaches the size, the factor is decomposed in full.
        power_iterations: Further multiplications of the sketch by the factor.
        method: "rsvd" (more accurate) or "srevd" (cheaper).
        spectrum_continuation: Take the eigenvalues that aren't kept as equal to the smallest kept one, instead of as 0.
        damping_rule: "pi" (factored Tikhonov), "relative" (the published rule lambda_A = phi w_max(A); damping is then
            phi) or "common" (exact on products of eigenvalues).
    """

    name: ClassVar[str] = "rs-kfac"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerSpectrum

    rank: int = 220
    oversampling: int = 10
    power_iterations: int = 4
    method: Literal["rsvd", "srevd"] = "rsvd"
    spectrum_continuation: bool = False
    damping_rule: DampingRule = "pi"

    def __post_init__(self) -> None:
        check_count("rank", self.rank, least=1)
        check_count("oversampling", self.oversampling, least=0)
        check_count("power_iterations", self.power_iterations, least=0)
        check_choice("method", self.method, ("rsvd", "srevd"))
        check_choice("damping_rule", self.damping_rule, ("pi", "relative", "common"))
        if not isinstance(self.spectrum_continuation, bool):
            raise ConfigError(f"{self.spectrum_continuation!r} must be true or false", path="spectrum_continuation")

    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        """Decomposes both factors; see `AbstractInverter.invert`."""
        del damping, previous
        A, G = self._decompose(statistics.A, "A", seed), self._decompose(statistics.G, "G", seed)
        return Inversion(
            preconditioner=assemble(statistics, A, G, damping_rule=self.damping_rule),
            outcome=Outcome.worst(A.outcome, G.outcome),
            diagnostics={**A.diagnostics, **G.diagnostics},
        )

    def _decompose(self, matrix: Tensor, label: str, seed: int) -> FactorSpectrum:
        found = randomized_spectrum(
            matrix,
            rank=self.rank,
            oversampling=self.oversampling,
            power_iterations=self.power_iterations,
            method=self.method,
            seed=seed,
            label=label,
        )
        if self.spectrum_continuation and not found.spectrum.complete:
            found = replace(found, spectrum=found.spectrum._replace(tail=found.spectrum.values[..., -1].clone()))
        return found

    def cost(self, shape: BlockShape) -> float:
        """Estimates (q + 2) products of d x d with d x s and as many orthogonalisations, or a full decomposition."""
        return shape.groups * (self._factor_cost(shape.d_in) + self._factor_cost(shape.d_out))

    def _factor_cost(self, d: int) -> float:
        width = min(self.rank, d) + self.oversampling
        if width >= d:
            return EIGH_FLOPS * d**3
        return (self.power_iterations + 2) * (2.0 * d * d * width + 4.0 * d * width * width)
