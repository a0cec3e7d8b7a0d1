"""K-FAC (Martens & Grosse, arXiv 1503.05671; convolutions: arXiv 1602.01407), damped by factor or exactly."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from kfdist import checks
from kfdist.curvature.inverse import AbstractPreconditioner, KroneckerInverse, KroneckerSpectrum, prepared_numbers
from kfdist.curvature.inverter import AbstractInverter, Estimate, Inversion, Operation, Work
from kfdist.curvature.spectra import EIGH_FLOPS, full_spectra, probes_like, spectral_inversion
from kfdist.curvature.statistics import KroneckerFactors
from kfdist.linalg.kronecker import DampingRule, split_by_largest, split_by_trace
from kfdist.linalg.psd import damped_cholesky_inverse, inverse_residual, largest_eigenvalue, trace
from kfdist.types import BlockShape

EIGENVALUE_FLOPS = 4 / 3
"""Operations of finding the eigenvalues alone over d^3: the reduction to tridiagonal form."""


@dataclass(frozen=True, kw_only=True)
class Kfac(AbstractInverter):
    """(A + lambda_A I)^{-1} and (G + lambda_G I)^{-1} by Cholesky; lambda_A lambda_G = lambda.

    A change of damping acts from the next version on. The exact joint damping needs eigenvalues: see `kfac-eigen`.

    Attributes:
        damping_rule: "pi" (traces) or "relative" (largest eigenvalues; damping is then a fraction phi).
    """

    name: ClassVar[str] = "kfac"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerInverse

    damping_rule: Literal["pi", "relative"] = "pi"

    def __post_init__(self) -> None:
        checks.choice("damping_rule", self.damping_rule, ("pi", "relative"))

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del previous
        trace_A, trace_G = trace(statistics.A), trace(statistics.G)
        q, p = statistics.A.shape[-1], statistics.G.shape[-1]
        if self.damping_rule == "pi":
            split = split_by_trace(trace_A, trace_G, d_in=q, d_out=p, damping=damping)
        else:
            largest = (torch.linalg.eigvalsh(matrix)[..., -1] for matrix in (statistics.A, statistics.G))
            split = split_by_largest(*largest, damping=damping)
        inverses: dict[str, Tensor] = {}
        diagnostics: dict[str, float] = {}
        for name, matrix, factor_damping in (("A", statistics.A, split[0]), ("G", statistics.G, split[1])):
            inverse, definite = damped_cholesky_inverse(matrix, factor_damping)
            if not bool(definite.all()):
                return Inversion.failed(f"factor {name} plus {factor_damping.min():.3g} I is not positive definite")
            inverses[name] = inverse
            probes = probes_like(matrix, seed=seed, label=name)
            residual = inverse_residual(matrix, factor_damping, inverse, probes)
            smallest = 1 / largest_eigenvalue(inverse, probes[..., :1]) - factor_damping
            diagnostics[f"residual_{name}"] = residual.max().item()
            diagnostics[f"smallest_eigenvalue_{name}"] = smallest.min().item()
            diagnostics[f"rank_{name}"] = float(matrix.shape[-1])
        preconditioner = KroneckerInverse(
            trace_A=trace_A,
            trace_G=trace_G,
            A_inverse=inverses["A"],
            G_inverse=inverses["G"],
            damping_A=split[0],
            damping_G=split[1],
        )
        return Inversion(preconditioner=preconditioner, diagnostics=diagnostics)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        """Counts d^3 operations a factor (d^3/3 to factorise, 2 d^3/3 to invert) and, if needed, its eigenvalues."""
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.CHOLESKY, float(d**3)) for d in sizes]
        if self.damping_rule == "relative":
            work += [Work(Operation.EIGH, EIGENVALUE_FLOPS * d**3) for d in sizes]
        return Estimate(work, sum(d * d for d in sizes))


@dataclass(frozen=True, kw_only=True)
class KfacEigen(AbstractInverter):
    """K-FAC in the eigenbases A = Q_A D_A Q_A^T, G = Q_G D_G Q_G^T, damped at apply (algorithms.md 1.1).

    The direction Q_G [(Q_G^T V Q_A) / (d_G d_A^T + lambda)] Q_A^T is that of (A (x) G + lambda I)^{-1} exactly, and
    lambda can change without a new inversion.

    Attributes:
        damping_rule: "common" (exact, above), "pi" or "relative" (each factor damped on its own).
    """

    name: ClassVar[str] = "kfac-eigen"
    produces: ClassVar[type[AbstractPreconditioner]] = KroneckerSpectrum

    damping_rule: DampingRule = "common"

    def __post_init__(self) -> None:
        checks.choice("damping_rule", self.damping_rule, ("common", "pi", "relative"))

    @override
    def invert(
        self, statistics: KroneckerFactors, *, damping: float, previous: Mapping[str, Tensor], seed: int
    ) -> Inversion:
        del damping, previous
        return spectral_inversion(statistics, *full_spectra(statistics, seed), damping_rule=self.damping_rule)

    @override
    def estimate(self, shape: BlockShape) -> Estimate:
        sizes = shape.d_in, shape.d_out
        work = [Work(Operation.EIGH, EIGH_FLOPS * d**3) for d in sizes]
        prepared = prepared_numbers(*((d, d) for d in sizes), damping_rule=self.damping_rule)
        return Estimate(work, sum(d * d for d in sizes), prepared)
